#!/bin/sh
# Writes the units that the API's tables consist of: generate.sh NUMBER DIRECTORY
set -eu
mkdir -p "$2"
awk -v units="$1" -v dir="$2" '
function unit(u,    file, f) {
    file = sprintf("%s/unit_%03d.c", dir, u)
    print "#include <stdint.h>\n#include <string.h>\n" > file
    for (f = 0; f < 60; f++) {
        printf "static uint32_t mix_%d(uint32_t a, uint32_t b)\n{\n    uint32_t t[32];\n", f > file
        printf "    for (int i = 0; i < 32; i++)\n        t[i] = (a * %du + (uint32_t)i * b) ^ (a >> (i %% %d + 1));\n", u * 977 + f * 31 + 7, f % 13 + 3 > file
        printf "    for (int r = 0; r < %d; r++)\n        for (int i = 0; i < 32; i++)\n            t[i] += t[(i * %d + r) %% 32] * %du + (t[i] << %d | t[i] >> %d);\n", f % 5 + 2, f * 2 + 3, f + u + 11, f % 30 + 1, 31 - f % 30 > file
        printf "    switch (t[a %% 32] %% 7) {\n" > file
        for (c = 0; c < 6; c++)
            printf "    case %d: return t[%d] ^ (b + %du);\n", c, (f + c * 5) % 32, u * 13 + c > file
        print "    default: return t[b % 32];\n    }\n}\n" > file
    }
    printf "uint32_t unit_%d(uint32_t x)\n{\n", u > file
    for (f = 0; f < 60; f++)
        printf "    x = mix_%d(x, x ^ %du);\n", f, f * 7 + u > file
    print "    return x;\n}" > file
    close(file)
}
BEGIN {
    for (u = 0; u < units; u++)
        unit(u)
    all = dir "/units.c"
    print "#include \"units.h\"\n" > all
    for (u = 0; u < units; u++)
        printf "unsigned unit_%d(unsigned x);\n", u > all
    print "\nunsigned sum_of_units(unsigned x)\n{\n    unsigned sum = 0;" > all
    for (u = 0; u < units; u++)
        printf "    sum += unit_%d(x + %du);\n", u, u > all
    print "    return sum;\n}" > all
    close(all)
    header = dir "/units.h"
    printf "#define UNITS %d\nunsigned sum_of_units(unsigned x);\n", units > header
    close(header)
}'
