#include <stdio.h>
#include "greet.h"

void greet(const char *path)
{
	char line[128];
	FILE *file = fopen(path, "r");

	if (file == NULL || fgets(line, sizeof line, file) == NULL) {
		perror(path);
		return;
	}
	printf("hello from c, %s", line);
	fclose(file);
}
