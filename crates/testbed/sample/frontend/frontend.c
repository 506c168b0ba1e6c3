/* The sample application's page. */
#include <stdlib.h>
#include <string.h>

#include "http.h"
#include "page.h"

static void answer(const struct request *request, struct response *response)
{
    if (!strcmp(request->path, "/") || !strcmp(request->path, "/index.html")) {
        response->type = "text/html; charset=utf-8";
        body_printf(response,
            "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>Sample %s</title>\n"
            "<style>body{font:18px sans-serif;margin:4rem;background:%s;color:%s}</style></head>\n"
            "<body><h1>%s</h1><p>This is version <b id=\"version\">%s</b>.</p></body></html>\n",
            APP_VERSION, PAGE_BACKGROUND, PAGE_COLOUR, PAGE_TITLE, APP_VERSION);
    } else if (!strcmp(request->path, "/version.json") || !strcmp(request->path, "/healthz")) {
        body_printf(response, "{\"version\":\"%s\"}\n", APP_VERSION);
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
