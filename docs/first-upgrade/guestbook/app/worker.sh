#!/bin/sh
# Notes once for each row that somebody wrote that it was worked on. What the database refuses is tried again.
. /db.sh
trap 'exit 0' TERM INT
while :; do
    left=$(db dump | sed 's/^2|//' | awk '$1 == "wrote" { wrote[$2] } $1 == "worked" { worked[$2] }
        END { for (row in wrote) if (!(row in worked)) print row }')
    for row in $left; do
        db add "$SCHEMA" "worked $row" >/dev/null
    done
    sleep 1 &
    wait $!
done
