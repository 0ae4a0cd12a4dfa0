#!/usr/bin/env bash
# Makes what compose.yaml wants beside itself: a token, a database password, and an empty file for keys. Keeps what is there.
#   sudo launch/labeling/secrets.sh
set -euo pipefail
umask 077
cd "${1:-$(dirname "${BASH_SOURCE[0]}")}"
SERVICE=10001 # the user of the image

[[ -s token ]] || openssl rand -hex 32 >token
[[ -s postgres_password ]] || openssl rand -hex 32 >postgres_password
[[ -s pgpass ]] || printf 'database:5432:laif:laif:%s\n' "$(cat postgres_password)" >pgpass
[[ -f keys.env ]] || cp keys.env.example keys.env
chmod 600 token pgpass postgres_password keys.env
if ! chown "$SERVICE" token pgpass 2>/dev/null; then
  echo "secrets.sh: token and pgpass must belong to user $SERVICE; run this with sudo" >&2
  exit 1
fi
echo "made; clients need the content of $PWD/token, and keys.env wants your keys"
