#!/bin/sh
# Notes once for each row that somebody wrote that it was worked on. What the database refuses is tried again.
. /db.sh
trap 'exit 0' TERM INT
while :; do
    all=$(db dump)
    wrote=$(echo "$all" | sed -n 's/^\(2|\)\{0,1\}wrote //p')
    for row in $wrote; do
        echo "$all" | grep -qE "^(2\|)?worked $row\$" || db add "$SCHEMA" "worked $row" >/dev/null
    done
    sleep 1 &
    wait $!
done
