//! Handshakes with peers that this node dials: retried early while a peer is new, and started again with peers
//! that are silent.

use std::{collections::BTreeMap, net::SocketAddr, time::Duration};

use tokio::time::Instant;

use super::{Error, report::Outcome};
use crate::{
    state::{Peer, State},
    topology::PublicKey,
    tunnel::Tunnel,
};

/// Delay before the first retry; each further delay is twice as long.
///
/// A peer that is not configured with this node's key yet ignores its first handshake, and WireGuard itself retries only after five
/// seconds. The delay doubles so that the response of a distant peer still matches the last handshake.
pub(super) const FIRST_RETRY: Duration = Duration::from_millis(500);
/// The last delay; then WireGuard's own timer takes over.
const LAST_RETRY: Duration = Duration::from_secs(4);

/// A handshake that has not been answered.
struct Pending {
    last: Instant,
    delay: Duration,
}

/// Peers that this node dials.
#[derive(Default)]
pub(super) struct Handshakes {
    /// Peers without a session so far.
    pending: BTreeMap<PublicKey, Pending>,
    /// Last endpoints of peers. A peer that is added again, or to a new engine, is dialled there for a new session: by itself
    /// it would continue the previous one, which this node no longer has, for up to two minutes.
    last_endpoints: BTreeMap<PublicKey, SocketAddr>,
    /// The planned endpoints of the last run.
    planned: BTreeMap<PublicKey, SocketAddr>,
}

impl Handshakes {
    /// Forgets pending handshakes: the node has no tunnel.
    pub(super) fn clear(&mut self) {
        self.pending.clear();
    }

    /// True while a peer has not answered.
    pub(super) fn is_pending(&self) -> bool {
        !self.pending.is_empty()
    }

    /// The peer to configure, with its last endpoint if it has no other. Starts retries for a new peer that this node
    /// keeps a session with.
    pub(super) fn added(&mut self, key: PublicKey, peer: &Peer, have: &State) -> Peer {
        let peer = Peer { endpoint: peer.endpoint.or_else(|| self.last_endpoints.get(&key).copied()), ..peer.clone() };
        if peer.keepalive.is_some() && peer.endpoint.is_some() && !have.peers.contains_key(&key) {
            self.pending.insert(key, Pending { last: Instant::now(), delay: FIRST_RETRY });
        }
        peer
    }

    /// Remembers where peers are.
    pub(super) fn seen(&mut self, have: &State) {
        let endpoints = have.peers.iter().filter_map(|(key, peer)| Some((*key, peer.endpoint?)));
        self.last_endpoints.extend(endpoints);
    }

    /// Marks peers whose planned endpoint has changed as silent, so that the new one is applied although a session lives.
    pub(super) fn moved(&mut self, have: &mut State, want: &State) {
        // The address of a name may be unknown for a while.
        let endpoint = |key: &PublicKey, peer: &Peer| peer.endpoint.or_else(|| self.planned.get(key).copied());
        let planned: BTreeMap<_, _> =
            want.peers.iter().filter_map(|(key, peer)| Some((*key, endpoint(key, peer)?))).collect();
        let is_new =
            |(key, endpoint): &(&PublicKey, &SocketAddr)| self.planned.get(key).is_some_and(|last| last != *endpoint);
        for (key, _) in planned.iter().filter(is_new) {
            if let Some(peer) = have.peers.get_mut(key) {
                peer.alive = false;
            }
        }
        self.planned = planned;
    }

    /// Repeats the handshake with each peer whose delay has passed: a peer that is deleted and added again is
    /// dialled at once.
    pub(super) async fn retry(&mut self, tunnel: &Tunnel, want: &State, outcome: &mut Outcome) {
        if self.pending.is_empty() {
            return;
        }
        let Some(sessions) = outcome.keep(tunnel.sessions().await) else { return };
        let silent = |key: &PublicKey| sessions.get(key).is_some_and(|(peer, _)| !peer.alive);
        self.pending.retain(|key, pending| pending.delay <= LAST_RETRY && silent(key));
        for (key, pending) in &mut self.pending {
            let Some(peer) = want.peers.get(key).filter(|_| pending.last.elapsed() >= pending.delay) else { continue };
            *pending = Pending { last: Instant::now(), delay: 2 * pending.delay };
            if outcome.keep(redial(tunnel, *key, peer).await).is_some() {
                tracing::debug!(peer = %key, "repeated the handshake with a peer that has not answered");
            }
        }
    }
}

async fn redial(tunnel: &Tunnel, key: PublicKey, peer: &Peer) -> Result<(), Error> {
    tunnel.delete_peer(key).await?;
    tunnel.put_peer(key, peer, None).await?;
    Ok(())
}
