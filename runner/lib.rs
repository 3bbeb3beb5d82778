//! The program: command line, containers, networks, volumes.
