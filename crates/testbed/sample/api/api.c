/* The sample application's API: answers from tables that a generator makes many units of. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "health.h"
#include "http.h"
#include "units.h"

/* Given out so far: a release's health may depend on it. */
static unsigned pages;

static void answer(const struct request *request, struct response *response)
{
    if (!strcmp(request->path, "/")) {
        pages++;
        body_printf(response, "{\"app\":\"api\",\"version\":\"%s\",\"units\":%d,\"sum\":%u}\n", APP_VERSION, UNITS, sum_of_units(7));
    } else if (!strcmp(request->path, "/healthz")) {
        response->status = HEALTH_STATUS;
        body_printf(response, "{\"status\":\"%s\",\"version\":\"%s\"}\n", HEALTH_STATUS == 200 ? "ok" : "failing", APP_VERSION);
    } else if (!strcmp(request->path, "/slow")) {
        const char *ms = strncmp(request->query, "ms=", 3) ? "1000" : request->query + 3;
        long delay = strtol(ms, NULL, 10);
        response->delay_ms = delay < 0 ? 0 : delay > 60000 ? 60000 : (int)delay;
        body_printf(response, "{\"slept_ms\":%d,\"version\":\"%s\"}\n", response->delay_ms, APP_VERSION);
    } else {
        response->status = 404;
        body_printf(response, "{\"detail\":\"no such page\"}\n");
    }
}

int main(void)
{
    const char *port = getenv("PORT");
    return serve(port ? atoi(port) : 8080, APP_VERSION, answer);
}
