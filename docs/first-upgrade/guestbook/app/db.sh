# One request to the database: its whole answer on standard output. To be read in by the other scripts.
db() { echo "$@" | nc -w 10 db 5432; }
