//! The `forge` program.

fn main() {}
