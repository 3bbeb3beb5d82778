void greet(const char *path);
