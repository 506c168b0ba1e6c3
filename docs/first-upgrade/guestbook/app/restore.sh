#!/bin/sh
# Puts the last copy back, whatever the database holds now, and opens it. It can be run again.
set -e
. /db.sh
[ -s /backup/rows ] && [ -s /backup/uploads.tar ] || { echo "restore: there is no copy in /backup" >&2; exit 1; }
tar -C /uploads -xf /backup/uploads.tar
answer=$({ echo load; cat /backup/rows; } | nc -w 30 db 5432)
[ "$answer" = ok ] || { echo "restore: the database says: $answer" >&2; exit 1; }
echo "restored $(($(wc -l </backup/rows) - 1)) rows and $(ls /uploads | wc -l) uploads"
