//! `cargo xtask lab`: manages labs; installs what they need first.

use anyhow::Result;
use raven_tests::cli::{self, LabCommand};

use crate::setup::{self, Need};

/// Runs the command.
pub(crate) fn run(command: LabCommand) -> Result<()> {
    if matches!(command, LabCommand::Up(_)) {
        setup::ensure(&[Need::Lab, Need::Kubernetes])?;
    }
    tokio::runtime::Runtime::new()?.block_on(cli::run(command))
}
