/* A database of lines, one request at a time. /data/rows begins with "schema N"; a row is acknowledged when it is on the disk.
 *
 *   add N TEXT   appends a row, from a client that writes form N; "busy" while locked, "schema M" when the rows have form M
 *   dump         everything
 *   lock unlock  whether rows are taken
 *   upgrade N    rewrites the rows into form N and unlocks; there is no way back
 *   load         replaces everything by the lines that follow, and unlocks
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <netinet/in.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static const char ROWS[] = "/data/rows", NEW[] = "/data/rows.new", LOCKED[] = "/data/locked";

static int is_locked(void) { return !access(LOCKED, F_OK); }

static int schema(void)
{
    int n = 0;
    FILE *rows = fopen(ROWS, "r");
    if (!rows || fscanf(rows, "schema %d", &n) != 1) n = -1;
    if (rows) fclose(rows);
    return n;
}

/* Makes what was written to NEW the rows, at once and for good. */
static int keep(FILE *fresh)
{
    int failed = fflush(fresh) || fsync(fileno(fresh));
    failed |= fclose(fresh);
    if (failed || rename(NEW, ROWS)) return -1;
    sync();
    return 0;
}

static const char *add(const char *rest)
{
    static char told[40];
    int form = 0, at = 0;
    if (sscanf(rest, "%d %n", &form, &at) != 1 || !at) return "what?\n";
    if (is_locked()) return "busy: the guestbook is being upgraded, try again\n";
    if (form != schema()) {
        snprintf(told, sizeof told, "schema %d\n", schema());
        return told;
    }
    FILE *rows = fopen(ROWS, "a");
    if (!rows) return "failed\n";
    int failed = fprintf(rows, "%s%s", form == 2 ? "2|" : "", rest + at) < 0 || fflush(rows) || fdatasync(fileno(rows));
    fclose(rows);
    return failed ? "failed\n" : "ok\n";
}

static const char *upgrade(int form)
{
    int from = schema();
    char line[1024];
    if (form < from || form > 2) return "there is no way to that form\n";
    FILE *rows = fopen(ROWS, "r"), *fresh = fopen(NEW, "w");
    if (!rows || !fresh) return "failed\n";
    fprintf(fresh, "schema %d\n", form);
    if (!fgets(line, sizeof line, rows)) return "failed\n";
    while (fgets(line, sizeof line, rows)) fprintf(fresh, "%s%s", form == 2 && from == 1 ? "2|" : "", line);
    fclose(rows);
    if (keep(fresh)) return "failed\n";
    unlink(LOCKED);
    return "ok\n";
}

static const char *load(FILE *in)
{
    char line[1024];
    FILE *fresh = fopen(NEW, "w");
    if (!fresh || !fgets(line, sizeof line, in) || strncmp(line, "schema ", 7)) return "these are no rows\n";
    do fputs(line, fresh); while (fgets(line, sizeof line, in));
    if (ferror(in) || keep(fresh)) return "failed\n";
    unlink(LOCKED);
    return "ok\n";
}

static void answer(FILE *in, FILE *out)
{
    char line[1024];
    if (!fgets(line, sizeof line, in) || !strchr(line, '\n')) return;
    if (!strncmp(line, "add ", 4)) {
        fputs(add(line + 4), out);
    } else if (!strcmp(line, "dump\n")) {
        FILE *rows = fopen(ROWS, "r");
        while (rows && fgets(line, sizeof line, rows)) fputs(line, out);
        if (rows) fclose(rows);
    } else if (!strcmp(line, "lock\n")) {
        int file = open(LOCKED, O_CREAT | O_WRONLY, 0600);
        fputs(file < 0 || fsync(file) ? "failed\n" : "ok\n", out);
        if (file >= 0) close(file);
    } else if (!strcmp(line, "unlock\n")) {
        unlink(LOCKED);
        fputs("ok\n", out);
    } else if (!strncmp(line, "upgrade ", 8)) {
        fputs(upgrade(atoi(line + 8)), out);
    } else if (!strcmp(line, "load\n")) {
        fputs(load(in), out);
    } else {
        fputs("what?\n", out);
    }
}

static void on_stop(int signal) { (void)signal; _exit(0); }

int main(void)
{
    signal(SIGPIPE, SIG_IGN);
    signal(SIGTERM, on_stop);
    if (schema() < 0) {
        FILE *fresh = fopen(NEW, "w");
        if (!fresh || fputs("schema 1\n", fresh) < 0 || keep(fresh)) return perror("appenddb: /data cannot be written"), 1;
    }
    struct sockaddr_in here = { .sin_family = AF_INET, .sin_port = htons(5432) };
    int one = 1, listening = socket(AF_INET, SOCK_STREAM, 0);
    setsockopt(listening, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(listening, (struct sockaddr *)&here, sizeof here) || listen(listening, 128)) return perror("appenddb"), 1;
    for (;;) {
        int fd = accept(listening, NULL, NULL);
        if (fd < 0) continue;
        struct timeval limit = { .tv_sec = 5 };
        setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
        setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit);
        FILE *in = fdopen(fd, "r"), *out = fdopen(dup(fd), "w");
        answer(in, out);
        fclose(out);
        fclose(in);
    }
}
