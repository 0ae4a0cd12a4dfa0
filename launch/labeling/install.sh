#!/usr/bin/env bash
# The labelling service on a Debian or Ubuntu machine, under systemd:
#   sudo launch/labeling/install.sh            from a checkout of the project; again: brings the code up to date
#   launch/labeling/install.sh --dry-run       prints what it would do
# Then: put keys into /etc/laif/keys.env and sudo systemctl restart laif-labels.
set -euo pipefail

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
CODE=$(cd "$HERE/../.." && pwd)
CONFIG=/etc/laif
DRY=""

do_it() {
  if [[ -n $DRY ]]; then
    printf '%q ' "$@"
    printf '\n'
  else
    "$@"
  fi
}

# Makes a file that is not there yet, of mode 600: it never was readable by others, and what a user wrote stays.
keep_or_make() { # PATH OWNER COMMAND...
  local path=$1 owner=$2
  shift 2
  if [[ -n $DRY ]]; then
    do_it "$@"
    printf '  > %s, owner %s, mode 600, unless it is there\n' "$path" "$owner"
    return
  fi
  if [[ ! -e $path ]]; then
    install -m 600 -o "$owner" /dev/null "$path"
    "$@" >"$path"
  fi
  chown "$owner" "$path"
  chmod 600 "$path"
}

case ${1:-} in
  "") ;;
  --dry-run) DRY=1 ;;
  *) echo "usage: install.sh [--dry-run]" >&2 && exit 2 ;;
esac
if [[ -z $DRY && $EUID -ne 0 ]]; then
  echo "install.sh: needs root: sudo $0" >&2
  exit 2
fi

id laif >/dev/null 2>&1 || do_it useradd --system --home-dir /var/lib/laif --shell /usr/sbin/nologin laif
do_it install -d -m 755 /opt/laif "$CONFIG"
if [[ -z $DRY ]] && ! command -v uv >/dev/null; then
  echo "install.sh: uv is not installed: https://docs.astral.sh/uv/getting-started/installation" >&2
  exit 2
fi
# Not below /root, where the service's user could not read it.
export UV_PYTHON_INSTALL_DIR=/opt/laif/python
# The locked versions of everything: the service runs from the same environment that `laif label` would.
do_it uv venv --quiet --allow-existing --python 3.12 /opt/laif/.venv
do_it uv pip install --quiet --python /opt/laif/.venv/bin/python -r "$CODE/requirements/py312.txt"
do_it uv pip install --quiet --python /opt/laif/.venv/bin/python --no-deps --reinstall-package laif_jax "$CODE"
keep_or_make "$CONFIG/token" laif openssl rand -hex 32
keep_or_make "$CONFIG/keys.env" root cat "$HERE/keys.env.example"
if [[ ! -e $CONFIG/labels.env ]]; then do_it install -m 644 "$HERE/labels.env.example" "$CONFIG/labels.env"; fi
do_it install -m 644 "$HERE/laif-labels.service" /etc/systemd/system/laif-labels.service
do_it systemctl daemon-reload
do_it systemctl enable laif-labels
do_it systemctl restart laif-labels
