// Prints a greeting and who runs it.
package main

import (
	"fmt"
	"os"
)

var version = "unknown"

func main() {
	fmt.Printf("hello %s from go %s as %d\n", os.Args[1], version, os.Getuid())
}
