//! `cargo xtask lab`: the lab's own commands, with what they need set up first.

use anyhow::Result;
use raven_tests::cli::{self, LabCommand};

use crate::setup::{self, Need};

/// Does it.
pub(crate) fn run(command: LabCommand) -> Result<()> {
    if matches!(command, LabCommand::Up(_)) {
        setup::ensure(&[Need::Lab, Need::Kubernetes])?;
    }
    tokio::runtime::Runtime::new()?.block_on(cli::run(command))
}
