//! What a run found and did.

use std::{sync::Arc, time::Duration};

use tokio::time::Instant;

use crate::{
    bpf,
    link::{self, Neighbours},
    netfilter,
    plan::Plan,
    state::Change,
    topology::PublicKey,
    tunnel::{self, Backend},
};

/// A driver could not do a step.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Devices, addresses, routes or rules.
    #[error(transparent)]
    Link(#[from] link::Error),
    /// Programs or maps.
    #[error(transparent)]
    Bpf(#[from] bpf::Error),
    /// WireGuard.
    #[error(transparent)]
    Tunnel(#[from] tunnel::Error),
    /// The exemption from source NAT.
    #[error(transparent)]
    Netfilter(#[from] netfilter::Error),
}

/// The result of one run, for status, metrics and logs.
#[derive(Debug)]
pub struct Report {
    /// The desired state.
    pub plan: Arc<Plan>,
    /// Steps that failed.
    pub failures: Vec<Error>,
    /// Settings and rules of other programs that stop packets, one sentence each.
    pub surroundings: Vec<String>,
    /// What the kernel's neighbour tables said when the surroundings were checked.
    pub neighbours: Neighbours,
    /// Raven's rule and its unreachable routes exist.
    pub fails_closed: bool,
    /// Objects that this run changed.
    pub change: Change,
    /// Objects changed since the agent's start without a new topology: restored after another program removed them, or
    /// applied after an earlier failure.
    pub restored: u64,
    /// How packets enter the tunnel on a gateway node: `xdp+tc`, `tc` or `stack`.
    pub tier: Option<&'static str>,
    /// Why the fastest tier is not used.
    pub tier_reason: Option<String>,
    /// The WireGuard implementation, on a gateway node.
    pub backend: Option<Backend>,
    /// This node's public key.
    pub public_key: PublicKey,
    /// Proof that this node has the private key.
    pub key_proof: String,
    /// The next run must start within this time, if nothing changes before.
    pub rerun_after: Option<Duration>,
    /// End of the run.
    pub ended: Instant,
}

impl Report {
    /// Everything that an operator must know, the most important first.
    pub fn complaints(&self) -> impl Iterator<Item = String> {
        let failures = self.failures.iter().map(ToString::to_string);
        failures.chain(self.surroundings.iter().cloned()).chain(self.plan.problems.iter().cloned())
    }
}

/// What a run has found and done so far.
#[derive(Debug, Default)]
pub(super) struct Outcome {
    pub(super) failures: Vec<Error>,
    pub(super) surroundings: Vec<String>,
    pub(super) fails_closed: bool,
    pub(super) change: Change,
    pub(super) tier: Option<&'static str>,
    pub(super) tier_reason: Option<String>,
    pub(super) rerun_after: Option<Duration>,
}

impl Outcome {
    /// Adds the change of a step, or records its failure.
    pub(super) fn take<E: Into<Error>>(&mut self, result: Result<Change, E>) {
        if let Some(change) = self.keep(result) {
            self.change += change;
        }
    }

    /// Records a failure; returns the value of a success.
    pub(super) fn keep<T, E: Into<Error>>(&mut self, result: Result<T, E>) -> Option<T> {
        result.map_err(|e| self.failures.push(e.into())).ok()
    }

    /// Requests the next run within this time.
    pub(super) fn rerun_within(&mut self, time: Duration) {
        self.rerun_after = Some(self.rerun_after.map_or(time, |earlier| earlier.min(time)));
    }
}
