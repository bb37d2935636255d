#!/usr/bin/env bash
# Which pre-processing a checkpoint has depends on the version of transformers, where its folder holds two files of it.
#
# A folder may have both a preprocessor_config.json, as image processors save it, and a processor_config.json with an
# "image_processor" in it, as processors of text and images do. One would expect the same file to be read by every version, or
# a word where the two disagree. Seen: AutoImageProcessor reads preprocessor_config.json in 4.57.6 and processor_config.json in
# 5.24.0, each without a word: the same folder gives other pixels after an upgrade.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy pillow==12.0.0
mkdir "$folder/checkpoint"
cat > "$folder/read.py" <<'PYTHON'
import json
import pathlib
import sys

import transformers
from transformers import AutoImageProcessor

folder = pathlib.Path(sys.argv[1])
edges = {"size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224}}
bicubic = {"image_processor_type": "BitImageProcessor", "resample": 3, **edges}
(folder / "config.json").write_text(json.dumps({"model_type": "vit"}))
(folder / "preprocessor_config.json").write_text(json.dumps(bicubic))
(folder / "processor_config.json").write_text(json.dumps({"image_processor": bicubic | {"resample": 2}}))
way = {"use_fast": False} if transformers.__version__.startswith("4.") else {"backend": "pil"}
resample = int(AutoImageProcessor.from_pretrained(folder, local_files_only=True, **way).resample)
read = {3: "preprocessor_config.json", 2: "processor_config.json"}[resample]
print(f"transformers {transformers.__version__} reads {read}")
sys.exit(0 if read == sys.argv[2] else 1)
PYTHON
for expected in "4.57.6 preprocessor_config.json" "5.24.0 processor_config.json"; do
  read -r version file <<< "$expected"
  "$folder/venv/bin/pip" install -q "transformers==$version"
  "$folder/venv/bin/python" "$folder/read.py" "$folder/checkpoint" "$file"
done
