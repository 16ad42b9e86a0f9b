//! Reads the observed state, diffs it with the plan, and runs the steps.

use futures::{StreamExt, stream};
use tracing::{Instrument, Span};

use super::{Error, Reconciler, report::Outcome};
use crate::{
    bpf,
    diff::{Step, diff},
    link::{self, Links},
    plan::Plan,
    state::{Change, Indexes, State},
    tunnel,
};

/// Route requests in flight at a time.
const IN_FLIGHT: usize = 64;

impl Reconciler {
    /// Adds the missing unreachable routes. It does not need the devices, so it can run before they exist.
    pub(super) async fn ensure_barriers(&self, plan: &Plan, outcome: &mut Outcome) {
        let Some(have) = outcome.keep(self.links.barriers().await) else { return };
        let steps: Vec<_> = plan.state.barriers.difference(&have).copied().map(Step::PutBarrier).collect();
        change_routes(&self.links, &steps, Indexes::NONE, outcome).await;
    }

    /// Brings routes, peers and maps to the planned state.
    pub(super) async fn change_state(&mut self, plan: &Plan, indexes: Indexes, outcome: &mut Outcome) {
        let have = self.read(indexes).await;
        let Some(mut have) = outcome.keep(have) else { return };
        self.handshakes.seen(&have);
        self.handshakes.moved(&mut have, &plan.state);
        let steps = diff(&have, &plan.state);
        for group in steps.chunk_by(|a, b| is_route(a) && is_route(b)) {
            if is_route(&group[0]) {
                change_routes(&self.links, group, indexes, outcome).await;
                continue;
            }
            for step in group {
                tracing::debug!(?step, "applying");
                outcome.take(self.run(step, &have).instrument(span(step, plan)).await);
            }
        }
        if steps.iter().any(bpf::is_map_entry) {
            let _ = outcome.keep(self.bpf.next_generation());
        }
    }

    async fn read(&mut self, indexes: Indexes) -> Result<State, Error> {
        let mut state = self.bpf.read()?;
        (state.routes, state.barriers) = self.links.routes(indexes).await?;
        if let Some(tunnel) = &self.tunnel {
            state.peers = tunnel.peers().await?;
        }
        Ok(state)
    }

    async fn run(&mut self, step: &Step, have: &State) -> Result<Change, Error> {
        match step {
            Step::PutPeer(key, peer) => {
                let tunnel = self.tunnel.as_ref().ok_or(tunnel::Error::NoDevice(*key))?;
                let peer = self.handshakes.added(*key, peer, have);
                tunnel.put_peer(*key, &peer, have.peers.get(key)).await?;
            }
            Step::TakePrefixes(_, prefixes) => {
                if let Some(tunnel) = &self.tunnel {
                    tunnel.take_prefixes(prefixes).await?;
                }
            }
            Step::DeletePeer(key) => {
                if let Some(tunnel) = &self.tunnel {
                    tunnel.delete_peer(*key).await?;
                }
            }
            map_entry => return Ok(self.bpf.apply(map_entry)?),
        }
        Ok(Change::ONE)
    }
}

/// The span of a step that concerns a peer.
fn span(step: &Step, plan: &Plan) -> Span {
    match step {
        Step::PutPeer(key, _) | Step::TakePrefixes(key, _) | Step::DeletePeer(key) => {
            let name = plan.peer_names.get(key);
            tracing::info_span!("peer", peer = %key, node = name.map(|n| &n.node), gateway = name.map(|n| &n.gateway))
        }
        _ => Span::none(),
    }
}

fn is_route(step: &Step) -> bool {
    matches!(step, Step::PutBarrier(_) | Step::DeleteBarrier(_) | Step::PutRoute(..) | Step::DeleteRoute(_))
}

/// Routes do not depend on each other: they are requested without waiting for each answer, or ten thousand of them
/// would take a minute.
async fn change_routes(links: &Links, steps: &[Step], indexes: Indexes, outcome: &mut Outcome) {
    let mut answers = stream::iter(steps).map(|step| change_route(links, step, indexes)).buffer_unordered(IN_FLIGHT);
    while let Some(answer) = answers.next().await {
        outcome.take(answer.map(|()| Change::ONE));
    }
}

async fn change_route(links: &Links, step: &Step, indexes: Indexes) -> Result<(), link::Error> {
    tracing::debug!(?step, "applying");
    match step {
        Step::PutBarrier(prefix) => links.put_barrier(*prefix).await,
        Step::DeleteBarrier(prefix) => links.delete_barrier(*prefix).await,
        Step::PutRoute(prefix, route) => links.put_route(*prefix, route, indexes).await,
        Step::DeleteRoute(prefix) => links.delete_route(*prefix).await,
        _ => Ok(()),
    }
}
