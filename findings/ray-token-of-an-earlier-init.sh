#!/usr/bin/env bash
# ray 2.60: once a ray.init() has been called on a host, `ray start --head` there starts a cluster that nobody can join.
#
# A ray.init() that begins a cluster of its own leaves a token in ~/.ray/auth_token, and `ray start --head` takes one that lies
# there for its cluster, with a warning. One would expect the other commands of the same user on the same host to take it too,
# as ray.init(address="auto") does. Seen: `ray start --address` and RAY_ADDRESS=host:port do not look for it unless
# RAY_AUTH_MODE=token is set; after 20 seconds they end with "Authentication token is missing or incorrect". Nothing but the
# order in which things were tried decides: where no ray.init() came before, the same commands work, without any token.
set -euo pipefail
folder=$(mktemp -d /tmp/ray-XXXX)
port=$((20000 + RANDOM % 10000))
ray() { HOME="$folder" RAY_USAGE_STATS_ENABLED=0 "$folder/venv/bin/ray" "$@" >> "$folder/log" 2>&1; }
connect() { HOME="$folder" RAY_ADDRESS="127.0.0.1:$port" "$folder/venv/bin/python" -c 'import ray; ray.init()' >> "$folder/log" 2>&1; }
outcome() { if "$@"; then echo joins; else echo "is refused"; fi; }
pid_of_head() { tr '\0' ' ' < "/proc/$1/cmdline" 2> /dev/null | grep -q -- "$folder/session" && echo "$1"; }
end() {
  for path in /proc/[0-9]*; do
    if pid=$(pid_of_head "${path#/proc/}"); then kill -9 "$pid"; fi
  done
}
trap 'end; sleep 1; rm -rf "$folder"' EXIT
unset RAY_AUTH_MODE RAY_AUTH_TOKEN RAY_AUTH_TOKEN_PATH RAY_ADDRESS
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q ray==2.60.0
head() { ray start --head --port "$port" --node-ip-address 127.0.0.1 --num-cpus 1 --include-dashboard=false --temp-dir "$folder/session"; }

head
before=$(outcome connect)
end
sleep 2
rm -rf "$folder/session"
HOME="$folder" "$folder/venv/bin/python" -c 'import ray; ray.init(include_dashboard=False, num_cpus=1)' >> "$folder/log" 2>&1
head
after=$(outcome connect)
with_mode=$(RAY_AUTH_MODE=token outcome connect)
echo "RAY_ADDRESS=host:port $before before a ray.init() on the host; it $after after one, and $with_mode with RAY_AUTH_MODE=token"
[ "$before, $after, $with_mode" = "joins, is refused, joins" ]
