#!/bin/sh
# Brings the rows into this version's form and opens the database to those who write it.
. /db.sh
answer=$(db upgrade "$SCHEMA")
[ "$answer" = ok ] || { echo "migrate: the database says: $answer" >&2; exit 1; }
echo "the rows are in form $SCHEMA"
