#!/usr/bin/env bash
# fsspec 2026.9.0: walk(on_error="raise") raises for the first folder only; below it, what cannot be listed is left out unsaid.
#
# One would expect on_error to hold for the whole walk, as onerror of os.walk does: it is documented so ("If raise, an underlying
# exception will be raised"), and it is the one way to know that a list of files is whole, since find() and glob() leave out what
# cannot be listed and have no such switch. Seen: walk() calls itself for each folder without on_error, whose default is "omit":
# a folder below the first whose listing fails (no permission, a network that was away for a moment) is as if it were empty. A
# function given as on_error is not called for it either.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q fsspec==2026.9.0
cat > "$folder/find.py" <<'PYTHON'
import pathlib
import sys

import fsspec
from fsspec.implementations.local import LocalFileSystem

folder = pathlib.Path(sys.argv[1])
for name in ("a/1.jpg", "b/2.jpg", "c/3.jpg"):
    (folder / name).parent.mkdir(parents=True)
    (folder / name).touch()


class AwayForAMoment(LocalFileSystem):
    def ls(self, path, **more):
        if path.endswith("/b"):
            raise OSError(5, "no answer this once", path)
        return super().ls(path, **more)


files = AwayForAMoment()
found, matched = ([pathlib.Path(path).name for path in paths] for paths in (files.find(folder), files.glob(f"{folder}/**/*.jpg")))
told = []
walked = len(list(files.walk(folder, on_error="raise"))), len(list(files.walk(folder, on_error=told.append)))
print(f"fsspec {fsspec.__version__}: find() {found}; glob() {matched}; walk() {walked} folders of 4, errors told: {told}")
try:
    list(files.walk(folder / "b", on_error="raise"))
    first = "left out"
except OSError:
    first = "raised"
print(f"the first folder's own error is {first}")
sys.exit(0 if found == matched == ["1.jpg", "3.jpg"] and walked == (3, 3) and not told and first == "raised" else 1)
PYTHON
"$folder/venv/bin/python" "$folder/find.py" "$folder/photos"
