//! The lab's L3 tests where there is no API server: inside a virtual machine, on its kernel and with that kernel's
//! WireGuard.
//!
//! As process 1 it is the machine's whole user space ([`init`]); else it runs the tests ([`story`]) on agents that know
//! the cluster from the snapshot on disk ([`raven_tests::offline`]). One line a check, `ok NAME: detail` or `FAILED
//! NAME: why`, and at the end
//! `N passed, M failed`. `cargo xtask test kernel` boots it.

#![forbid(unsafe_code)]

mod init;
mod story;

use std::process::ExitCode;

fn main() -> ExitCode {
    if std::process::id() == 1 {
        init::run();
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("tokio starts");
    if runtime.block_on(story::run()) { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
