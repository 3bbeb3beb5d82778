//! The program: command line, containers, networks, volumes.
//!
//! [`cli`] turns arguments into requests and events into a terminal; [`container`] is the one way that a program starts,
//! for `RUN` and for `forge run` alike; [`network`] and [`volume`] are what it is attached to. This is the only crate that
//! touches the terminal, the environment and `unsafe`.

pub mod cli;
pub mod container;
pub mod network;
pub mod volume;
