#!/bin/sh
# From here on nobody's write is accepted, until the migration or a restore opens the database again: what was accepted is
# in the copy. A copy that fails opens it at once.
. /db.sh
fail() { echo "backup: $1" >&2; db unlock; exit 1; }
[ "$(db lock)" = ok ] || { echo "backup: the database does not lock" >&2; exit 1; }
db dump >/backup/rows.new && [ -s /backup/rows.new ] || fail "the rows cannot be copied"
tar -C /uploads -cf /backup/uploads.new . || fail "the uploads cannot be copied"
mv /backup/rows.new /backup/rows && mv /backup/uploads.new /backup/uploads.tar && sync || fail "the copy cannot be kept"
echo "saved $(($(wc -l </backup/rows) - 1)) rows and $(ls /uploads | wc -l) uploads"
