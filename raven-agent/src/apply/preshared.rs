//! The cluster's preshared key, from the file that the DaemonSet mounts. It may change at any time.

use std::path::Path;

use crate::{
    state::Preshared,
    topology::PresharedKey,
    tunnel::{self, load_preshared},
};

/// The key as it was read last.
#[derive(Debug)]
pub(super) struct PresharedSource {
    /// The key that applies if the file does not exist.
    fallback: Option<PresharedKey>,
    current: Preshared,
}

impl PresharedSource {
    /// Unknown until the file has been read: peers keep the key that they have.
    pub(super) fn new(fallback: Option<PresharedKey>) -> Self {
        Self { fallback, current: Preshared::Keep }
    }

    /// The key for the plan.
    pub(super) fn current(&self) -> Preshared {
        self.current
    }

    /// Reads the file. True if the key is another one than before. After an error the previous key stays.
    pub(super) fn read(&mut self, file: &Path) -> Result<bool, tunnel::Error> {
        let key = load_preshared(file)?.or(self.fallback);
        let before = std::mem::replace(&mut self.current, key.into());
        if before == self.current {
            return Ok(false);
        }
        match (before, self.current) {
            (_, Preshared::Key(_)) => {
                tracing::info!(file = %file.display(), "tunnels use a new preshared key; peers without it are unreachable");
            }
            (Preshared::Key(_), _) => {
                tracing::info!(file = %file.display(), "tunnels use no preshared key any more; peers that have one are unreachable");
            }
            (Preshared::None | Preshared::Keep, _) => {}
        }
        Ok(true)
    }
}
