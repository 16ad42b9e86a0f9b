//! A peer: its sessions, endpoint and prefixes.

use std::{
    collections::BTreeSet,
    net::SocketAddr,
    time::{Duration, SystemTime},
};

use bytes::BytesMut;
use gotatun::{
    noise::{Tunn, TunnResult, errors::WireGuardError},
    packet::{Packet, WgKind},
    tun::MtuWatcher,
    x25519::PublicKey,
};
use ipnet::IpNet;
use parking_lot::Mutex;

/// A peer of a device. It is changed in place, so its sessions survive every change.
pub(crate) struct Peer {
    pub(crate) key: PublicKey,
    state: Mutex<State>,
}

struct State {
    tunnel: Tunn,
    endpoint: Option<SocketAddr>,
    /// When the last handshake was completed.
    handshake: Option<SystemTime>,
    /// This end has responded to a handshake, which the first packet of the new session completes.
    is_responding: bool,
    /// When this end last began to dial a peer that had given up.
    redialled: Option<SystemTime>,
    prefixes: BTreeSet<IpNet>,
}

/// The result of a packet for a peer.
pub(crate) enum Encrypted {
    /// A message for the peer: the packet, or the handshake that it waits for.
    Send(WgKind, SocketAddr),
    /// The packet waits for the handshake that is in progress.
    Waits,
    /// It is not known where the peer is.
    NoEndpoint,
}

/// The result of a received message.
pub(crate) enum Received {
    /// Nothing to do.
    Done,
    /// An IP packet, padded, or nothing (a keepalive).
    Packet(BytesMut),
    /// Messages for the sender.
    Replies(Vec<WgKind>),
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

/// Whether keepalives dial a peer again that did not answer for 90 s; Linux does so as well.
const REDIAL: Duration = Duration::from_secs(5);

impl Peer {
    pub(crate) fn new(key: PublicKey, tunnel: Tunn) -> Self {
        let state = State {
            tunnel,
            endpoint: None,
            handshake: None,
            is_responding: false,
            redialled: None,
            prefixes: BTreeSet::new(),
        };
        Self { key, state: Mutex::new(state) }
    }

    /// Encrypts a packet. Without a session, keeps it and starts a handshake.
    pub(crate) fn encrypt(&self, packet: BytesMut) -> Encrypted {
        let mut state = self.state.lock();
        let Some(endpoint) = state.endpoint else { return Encrypted::NoEndpoint };
        let message = state.tunnel.handle_outgoing_packet(Packet::from_bytes(packet), None);
        message.map_or(Encrypted::Waits, |message| Encrypted::Send(message, endpoint))
    }

    /// Processes a message. A valid one sets the endpoint: the peer may have moved.
    pub(crate) fn receive(&self, message: WgKind, source: SocketAddr) -> Received {
        let mut state = self.state.lock();
        let is_initiation = matches!(message, WgKind::HandshakeInit(_));
        match state.tunnel.handle_incoming_packet(message) {
            TunnResult::Done | TunnResult::Err(_) => Received::Done,
            TunnResult::WriteToTunnel(mut packet) => {
                state.endpoint = Some(source);
                if std::mem::take(&mut state.is_responding) {
                    state.handshake = Some(SystemTime::now());
                }
                Received::Packet(std::mem::take(packet.buf_mut()))
            }
            TunnResult::WriteToNetwork(reply) => {
                state.endpoint = Some(source);
                state.is_responding = is_initiation;
                if !is_initiation {
                    state.handshake = Some(SystemTime::now());
                }
                // Packets that waited for the session are padded already.
                let mut no_padding = MtuWatcher::new(0);
                let waiting = state.tunnel.get_queued_packets(&mut no_padding);
                Received::Replies(std::iter::once(reply).chain(waiting).collect())
            }
        }
    }

    /// What has to be sent because time has passed: a keepalive, a handshake.
    pub(crate) fn tick(&self) -> Option<(WgKind, SocketAddr)> {
        let mut state = self.state.lock();
        let endpoint = state.endpoint?;
        let message = match state.tunnel.update_timers() {
            Ok(message) => message,
            // gotatun gives up after 90 s. A peer with keepalives must come back by itself when the link does.
            Err(WireGuardError::ConnectionExpired) => state.redial(),
            Err(_) => None,
        };
        Some((message?, endpoint))
    }

    /// Starts a handshake if there is no session.
    pub(crate) fn dial(&self) -> Option<(WgKind, SocketAddr)> {
        let mut state = self.state.lock();
        let endpoint = state.endpoint.filter(|_| !state.tunnel.has_active_session())?;
        Some((state.tunnel.format_handshake_initiation(false)?.into(), endpoint))
    }

    /// Applies the given settings; the others stay.
    pub(crate) fn change(&self, settings: Settings) {
        let mut state = self.state.lock();
        if let Some(endpoint) = settings.endpoint {
            state.endpoint = Some(endpoint);
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

    /// The peer's sessions and their key. To be called only by the device.
    pub(crate) fn with_tunnel(&self, work: impl FnOnce(&mut Tunn)) {
        work(&mut self.state.lock().tunnel);
    }

    /// The peer's prefixes. To be changed only by the device, together with its table.
    pub(crate) fn with_prefixes<T>(&self, work: impl FnOnce(&mut BTreeSet<IpNet>) -> T) -> T {
        work(&mut self.state.lock().prefixes)
    }

    pub(crate) fn summary(&self) -> Summary {
        let state = self.state.lock();
        let (_, sent, received, ..) = state.tunnel.stats();
        Summary {
            endpoint: state.endpoint,
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
    fn redial(&mut self) -> Option<WgKind> {
        self.tunnel.persistent_keepalive()?;
        let now = SystemTime::now();
        let is_due = self.redialled.is_none_or(|last| now.duration_since(last).is_ok_and(|passed| passed >= REDIAL));
        if !is_due {
            return None;
        }
        self.redialled = Some(now);
        self.tunnel.format_handshake_initiation(false).map(Into::into)
    }
}
