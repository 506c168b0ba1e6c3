#!/bin/sh
# A tick every other second.
. /db.sh
trap 'exit 0' TERM INT
while :; do
    db add "$SCHEMA" "tick $(date -u +%Y-%m-%dT%H:%M:%SZ)" >/dev/null
    sleep 2 &
    wait $!
done
