//! A peer: its sessions, endpoint and prefixes.

use std::{
    collections::{BTreeSet, VecDeque},
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use bytes::BytesMut;
use gotatun::{
    noise::{Tunn, TunnResult, errors::WireGuardError, rate_limiter::RateLimiter},
    packet::{Packet, WgKind},
    tun::MtuWatcher,
    x25519::{PublicKey, StaticSecret},
};
use ipnet::IpNet;
use parking_lot::Mutex;

use crate::udp::Endpoint;

/// A peer of a device. It is changed in place, so its sessions survive every change.
pub(crate) struct Peer {
    pub(crate) key: PublicKey,
    state: Mutex<State>,
}

struct State {
    tunnel: Tunn,
    endpoint: Option<Endpoint>,
    /// The peer has dialled this end, which does not dial it: the peer knows this end by one address.
    has_dialled: bool,
    /// This end has sent an initiation since the last valid message of the peer.
    is_unanswered: bool,
    /// When the last handshake was completed.
    handshake: Option<SystemTime>,
    /// The index of the session that this end has created by responding, until its first packet arrives.
    responded: Option<u32>,
    /// Packets that wait until the peer uses that session: there is no other one (whitepaper §5.4.6). None: no need to wait.
    held: Option<VecDeque<BytesMut>>,
    /// When this end last dialled a peer that had not answered.
    redialled: Option<Instant>,
    prefixes: BTreeSet<IpNet>,
}

/// The result of a packet for a peer.
pub(crate) enum Encrypted {
    /// A message for the peer: the packet, or the handshake that it waits for.
    Send(WgKind, Endpoint),
    /// The packet waits for the handshake that is in progress.
    Waits,
    /// It is not known where the peer is.
    NoEndpoint,
}

/// The result of a received message.
#[derive(Default)]
pub(crate) struct Received {
    /// An IP packet, padded; an empty one is a keepalive.
    pub(crate) packet: Option<BytesMut>,
    /// Messages for the sender.
    pub(crate) replies: Vec<WgKind>,
}

/// What `wg show` prints of a peer.
pub(crate) struct Summary {
    pub(crate) endpoint: Option<SocketAddr>,
    pub(crate) preshared: Option<[u8; 32]>,
    /// Seconds; None: off.
    pub(crate) keepalive: Option<u16>,
    pub(crate) handshake: Option<SystemTime>,
    /// Bytes received and sent.
    pub(crate) received: u64,
    pub(crate) sent: u64,
    pub(crate) prefixes: Vec<IpNet>,
}

/// The least time between two attempts to dial a peer that has keepalives and did not answer for 90 s.
const REDIAL: Duration = Duration::from_secs(5);
/// Packets that wait for a session, as in gotatun.
const HELD: usize = 256;

impl Peer {
    pub(crate) fn new(key: PublicKey, tunnel: Tunn) -> Self {
        let state = State {
            tunnel,
            endpoint: None,
            has_dialled: false,
            is_unanswered: false,
            handshake: None,
            responded: None,
            held: None,
            redialled: None,
            prefixes: BTreeSet::new(),
        };
        Self { key, state: Mutex::new(state) }
    }

    /// Encrypts a packet. Without a session, keeps it and starts a handshake.
    pub(crate) fn encrypt(&self, packet: BytesMut) -> Encrypted {
        let mut state = self.state.lock();
        let Some(endpoint) = state.endpoint else { return Encrypted::NoEndpoint };
        let message = match &mut state.held {
            Some(held) => {
                if held.len() < HELD {
                    held.push_back(packet);
                }
                state.tunnel.format_handshake_initiation(false).map(Into::into)
            }
            None => state.tunnel.handle_outgoing_packet(Packet::from_bytes(packet), None),
        };
        let Some(message) = message else { return Encrypted::Waits };
        let endpoint = state.endpoint_for(&message, endpoint);
        Encrypted::Send(message, endpoint)
    }

    /// Processes a message. A valid one sets the endpoint: the peer may have moved.
    pub(crate) fn receive(&self, message: WgKind, from: Endpoint) -> Received {
        let mut state = self.state.lock();
        let session = match &message {
            WgKind::Data(data) => Some(data.header.receiver_idx.get()),
            _ => None,
        };
        let is_initiation = matches!(message, WgKind::HandshakeInit(_));
        let had_session = state.tunnel.time_since_last_handshake().is_some();
        match state.tunnel.handle_incoming_packet(message) {
            TunnResult::Done | TunnResult::Err(_) => Received::default(),
            TunnResult::WriteToTunnel(mut packet) => {
                state.heard(from);
                let is_first = state.responded.is_some() && state.responded == session;
                let replies = if is_first { state.connected() } else { Vec::new() };
                Received { packet: Some(std::mem::take(packet.buf_mut())), replies }
            }
            TunnResult::WriteToNetwork(reply) => {
                state.has_dialled |= is_initiation && state.tunnel.persistent_keepalive().unwrap_or(0) == 0;
                state.heard(from);
                let mut replies = vec![reply];
                match &replies[0] {
                    WgKind::HandshakeResp(response) => {
                        state.responded = Some(response.sender_idx.get());
                        if !had_session {
                            state.held.get_or_insert_default();
                        }
                    }
                    _ => replies.extend(state.connected()),
                }
                Received { packet: None, replies }
            }
        }
    }

    /// What has to be sent because time has passed: a keepalive, a handshake. To be called for every peer: gotatun's clock
    /// is that of the last call.
    pub(crate) fn tick(&self) -> Option<(WgKind, Endpoint)> {
        let mut state = self.state.lock();
        let message = match state.tunnel.update_timers() {
            Ok(message) => message,
            // gotatun gives up after 90 s. A peer with keepalives must come back by itself when the link does.
            Err(WireGuardError::ConnectionExpired) if state.endpoint.is_some() => state.redial(),
            Err(_) => None,
        };
        let (message, endpoint) = (message?, state.endpoint?);
        let endpoint = state.endpoint_for(&message, endpoint);
        Some((message, endpoint))
    }

    /// Starts a handshake if there is no session.
    pub(crate) fn dial(&self) -> Option<(WgKind, Endpoint)> {
        let mut state = self.state.lock();
        let endpoint = state.endpoint.filter(|_| !state.tunnel.has_active_session())?;
        let message = state.tunnel.format_handshake_initiation(false)?.into();
        let endpoint = state.endpoint_for(&message, endpoint);
        Some((message, endpoint))
    }

    /// The device has another key: all sessions end.
    pub(crate) fn set_private(&self, private: &StaticSecret, public: PublicKey, limiter: Arc<RateLimiter>) {
        let mut state = self.state.lock();
        state.tunnel.set_static_private(private.clone(), public, limiter);
        (state.responded, state.held) = (None, None);
    }

    /// Applies the given settings; the others stay.
    pub(crate) fn change(&self, settings: Settings) {
        let mut state = self.state.lock();
        if let Some(endpoint) = settings.endpoint {
            let is_same = state.endpoint.is_some_and(|present| present.remote == endpoint);
            if !is_same {
                state.endpoint = Some(endpoint.into());
            }
        }
        if let Some(preshared) = settings.preshared {
            state.tunnel.set_preshared_key(preshared);
        }
        if let Some(keepalive) = settings.keepalive
            && state.tunnel.persistent_keepalive().unwrap_or(0) != keepalive
        {
            state.tunnel.set_persistent_keepalive(Some(keepalive));
        }
    }

    /// The peer's prefixes. To be changed only by the device, together with its table.
    pub(crate) fn with_prefixes<T>(&self, work: impl FnOnce(&mut BTreeSet<IpNet>) -> T) -> T {
        work(&mut self.state.lock().prefixes)
    }

    pub(crate) fn summary(&self) -> Summary {
        let state = self.state.lock();
        let (_, sent, received, ..) = state.tunnel.stats();
        Summary {
            endpoint: state.endpoint.map(|endpoint| endpoint.remote),
            preshared: state.tunnel.preshared_key(),
            keepalive: state.tunnel.persistent_keepalive(),
            handshake: state.handshake,
            received: received as u64,
            sent: sent as u64,
            prefixes: state.prefixes.iter().copied().collect(),
        }
    }
}

/// Settings to change. None: as before.
#[derive(Default)]
pub(crate) struct Settings {
    pub(crate) endpoint: Option<SocketAddr>,
    pub(crate) preshared: Option<Option<[u8; 32]>>,
    /// Seconds; 0: off.
    pub(crate) keepalive: Option<u16>,
}

impl State {
    /// A valid message came from there. A peer that dials gets its answers from the address that it has dialled, because a
    /// NAT on its way drops others. To a peer that this end dials (it has keepalives), the routes choose the source.
    fn heard(&mut self, from: Endpoint) {
        let local = from.local.filter(|_| self.has_dialled);
        (self.endpoint, self.is_unanswered) = (Some(Endpoint { local, ..from }), false);
    }

    /// The endpoint for a message. After an unanswered initiation, the routes choose the source: the address may still be
    /// this host's, and lead nowhere.
    fn endpoint_for(&mut self, message: &WgKind, present: Endpoint) -> Endpoint {
        let is_initiation = matches!(message, WgKind::HandshakeInit(_));
        if !is_initiation || !std::mem::replace(&mut self.is_unanswered, true) {
            return present;
        }
        let chosen_by_routes = present.remote.into();
        (self.has_dialled, self.endpoint) = (false, Some(chosen_by_routes));
        chosen_by_routes
    }

    /// A handshake is complete. Returns the packets that waited for it.
    fn connected(&mut self) -> Vec<WgKind> {
        self.handshake = Some(SystemTime::now());
        self.responded = None;
        // They are padded already.
        let mut no_padding = MtuWatcher::new(0);
        let mut waiting: Vec<WgKind> = self.tunnel.get_queued_packets(&mut no_padding).collect();
        for packet in self.held.take().unwrap_or_default() {
            waiting.extend(self.tunnel.handle_outgoing_packet(Packet::from_bytes(packet), None));
        }
        waiting
    }

    fn redial(&mut self) -> Option<WgKind> {
        self.tunnel.persistent_keepalive()?;
        if self.redialled.is_some_and(|last| last.elapsed() < REDIAL) {
            return None;
        }
        self.redialled = Some(Instant::now());
        self.tunnel.format_handshake_initiation(false).map(Into::into)
    }
}

#[cfg(test)]
mod tests {
    use gotatun::noise::index_table::IndexTable;

    use super::*;

    fn source() -> Endpoint {
        SocketAddr::from(([192, 0, 2, 1], 4500)).into()
    }

    /// A peer of a device, and the other end of its sessions.
    fn ends() -> (Peer, Tunn) {
        let secrets = [1, 2].map(|byte| StaticSecret::from([byte; 32]));
        let public = secrets.each_ref().map(PublicKey::from);
        let tunnel = |own: usize| {
            let limiter = Arc::new(RateLimiter::new(&public[own], 100));
            Tunn::new(secrets[own].clone(), public[1 - own], None, None, IndexTable::from_os_rng(), limiter)
        };
        (Peer::new(public[1], tunnel(0)), tunnel(1))
    }

    /// The other end dials. Returns its first packet of the new session.
    fn dialled(peer: &Peer, other: &mut Tunn) -> WgKind {
        let initiation = other.format_handshake_initiation(true).expect("an initiation");
        let mut received = peer.receive(initiation.into(), source());
        assert_eq!(received.replies.len(), 1, "the response alone");
        match other.handle_incoming_packet(received.replies.remove(0)) {
            TunnResult::WriteToNetwork(keepalive) => keepalive,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn session_of_a_peer_whose_endpoint_was_unknown_starts_with_its_handshake() {
        let (peer, mut other) = ends();
        std::thread::sleep(Duration::from_millis(300));
        assert!(peer.tick().is_none());
        let first = dialled(&peer, &mut other);
        peer.receive(first, source());
        let age = peer.state.lock().tunnel.time_since_last_handshake().expect("a session");
        assert!(age < Duration::from_millis(300), "the session is {age:?} old");
    }

    #[test]
    fn peer_that_dials_is_answered_from_the_address_that_it_dialled() {
        let (peer, mut other) = ends();
        let local = Some([192, 0, 2, 77].into());
        let from = Endpoint { local, ..source() };
        let initiation = other.format_handshake_initiation(true).expect("an initiation");
        peer.receive(initiation.into(), from);
        assert_eq!(peer.state.lock().endpoint, Some(from));
        // Its last endpoint is configured again, as after a restart of the agent.
        peer.change(Settings { endpoint: Some(from.remote), ..Settings::default() });
        assert_eq!(peer.state.lock().endpoint, Some(from));
        // An initiation of this end has no answer: the next one leaves as the routes choose.
        let initiation = |peer: &Peer| {
            let mut state = peer.state.lock();
            let message = state.tunnel.format_handshake_initiation(true).expect("an initiation").into();
            let present = state.endpoint.expect("an endpoint");
            state.endpoint_for(&message, present)
        };
        assert_eq!(initiation(&peer), from);
        assert_eq!(initiation(&peer), source());
    }

    #[test]
    fn answers_to_a_peer_with_keepalives_leave_as_the_routes_choose() {
        let (peer, mut other) = ends();
        peer.change(Settings { keepalive: Some(15), ..Settings::default() });
        let initiation = other.format_handshake_initiation(true).expect("an initiation");
        peer.receive(initiation.into(), Endpoint { local: Some([192, 0, 2, 77].into()), ..source() });
        assert_eq!(peer.state.lock().endpoint, Some(source()));
    }

    #[test]
    fn packets_wait_in_order_until_the_peer_uses_the_session_that_it_started() {
        let (peer, mut other) = ends();
        let first = dialled(&peer, &mut other);
        assert!(peer.summary().handshake.is_none(), "the handshake is not complete");
        let packet = |number: u8| BytesMut::from(&[number; 32][..]);
        // The peer may be an attacker who repeats an old initiation, so this end dials as well.
        assert!(matches!(peer.encrypt(packet(0)), Encrypted::Send(WgKind::HandshakeInit(_), _)));
        assert!(matches!(peer.encrypt(packet(1)), Encrypted::Waits));
        let received = peer.receive(first, source());
        assert!(received.packet.is_some_and(|packet| packet.is_empty()), "a keepalive");
        assert!(peer.summary().handshake.is_some());
        assert!(matches!(peer.encrypt(packet(2)), Encrypted::Send(WgKind::Data(_), _)));
        let arrived: Vec<u8> = received
            .replies
            .into_iter()
            .map(|reply| match other.handle_incoming_packet(reply) {
                TunnResult::WriteToTunnel(packet) => packet[0],
                other => panic!("{other:?}"),
            })
            .collect();
        assert_eq!(arrived, [0, 1]);
    }
}
