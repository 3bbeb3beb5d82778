//! The `forge` program: three lives of one binary.
//!
//! It is the command that people type; the single-threaded helper that starts containers for it (a process with
//! threads must not run code between clone and exec); and, through that helper, the first moments of each container.

use std::process::ExitCode;

fn main() -> ExitCode {
    if std::env::args_os().nth(1).is_some_and(|first| first == forge::container::HELPER_ARGUMENT) {
        forge::container::helper_main();
    }
    forge::cli::main()
}
