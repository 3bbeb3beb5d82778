//! The program from outside: real namespaces, overlay, registries and projects. A module per area.
//!
//! Tests need root. What the machine lacks is said on stderr (`skipped: …`); `.ci/run` installs what can be installed.

#![cfg(test)]

mod support;

mod bad_input;
mod build;
mod container;
mod escape;
mod images;
mod kill;
mod layout;
mod projects;
mod registry;
mod rootless;
mod run;
