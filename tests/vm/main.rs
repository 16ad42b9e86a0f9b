//! L3 tests without an API server, inside a virtual machine: on its kernel and with that kernel's WireGuard.
//!
//! As process 1, the program is the machine's whole user space ([`init`]). Otherwise it runs the checks
//! ([`scenario`]) with agents that load the topology from a snapshot ([`raven_tests::offline`]). It prints one line
//! per check, `ok NAME: detail` or `FAILED NAME: reason`, and at the end `N passed, M failed`. `cargo xtask test
//! kernel` boots the machine.

#![forbid(unsafe_code)]

mod init;
mod interop;
mod scenario;

use std::process::ExitCode;

fn main() -> ExitCode {
    if std::process::id() == 1 {
        init::run();
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("start tokio");
    if runtime.block_on(scenario::run()) { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
