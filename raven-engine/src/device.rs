//! What the workers of a device share: its key, its peers, and the tables that lead to them.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
};

use gotatun::{
    noise::{Tunn, handshake::parse_handshake_anon, index_table::IndexTable},
    packet::WgKind,
    x25519::{PublicKey, StaticSecret},
};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use parking_lot::{RwLock, RwLockReadGuard};
use prefix_trie::PrefixMap;

use crate::{
    guard::Guard,
    peer::{Peer, Settings},
    udp::Endpoint,
};

/// A WireGuard device.
pub(crate) struct Device {
    config: RwLock<Config>,
    /// By session index. Workers insert; the timer removes what has expired.
    sessions: RwLock<HashMap<u32, Arc<Peer>>>,
    indices: IndexTable,
    /// MTU of the TUN device in bytes.
    pub(crate) mtu: AtomicUsize,
    pub(crate) lost: Lost,
}

/// Packets that were dropped since the last report, by reason.
#[derive(Default)]
pub(crate) struct Lost {
    /// No peer has the destination.
    pub(crate) no_peer: AtomicU64,
    /// It is not known where the peer is.
    pub(crate) no_endpoint: AtomicU64,
    /// The sender's prefixes do not contain the source.
    pub(crate) wrong_source: AtomicU64,
    /// They contradict their virtio header.
    pub(crate) malformed: AtomicU64,
    /// The socket did not take them.
    pub(crate) not_sent: AtomicU64,
    /// The TUN device did not take them.
    pub(crate) not_delivered: AtomicU64,
}

/// What is configured.
#[derive(Default)]
pub(crate) struct Config {
    pub(crate) identity: Option<Identity>,
    pub(crate) peers: HashMap<[u8; 32], Arc<Peer>>,
    v4: PrefixMap<Ipv4Net, Arc<Peer>>,
    v6: PrefixMap<Ipv6Net, Arc<Peer>>,
}

/// The device's own key.
pub(crate) struct Identity {
    pub(crate) private: StaticSecret,
    pub(crate) public: PublicKey,
    pub(crate) guard: Guard,
}

/// Stands for a key that is not set; nothing is sent with it.
const UNSET: [u8; 32] = [1; 32];

impl Identity {
    fn new(key: [u8; 32]) -> Self {
        let private = StaticSecret::from(key);
        let public = PublicKey::from(&private);
        Self { private, public, guard: Guard::new(&public) }
    }
}

impl Device {
    pub(crate) fn new(mtu: usize) -> Self {
        Self {
            config: RwLock::default(),
            sessions: RwLock::default(),
            indices: IndexTable::from_os_rng(),
            mtu: AtomicUsize::new(mtu),
            lost: Lost::default(),
        }
    }

    /// The configuration. Workers hold it for one batch of packets.
    pub(crate) fn config(&self) -> RwLockReadGuard<'_, Config> {
        self.config.read()
    }

    /// Makes a session known before its index is sent to the peer, unless the peer was removed meanwhile.
    pub(crate) fn register(&self, config: &Config, message: &WgKind, peer: &Arc<Peer>) {
        let index = match message {
            WgKind::HandshakeInit(init) => init.sender_idx.get(),
            WgKind::HandshakeResp(response) => response.sender_idx.get(),
            WgKind::CookieReply(_) | WgKind::Data(_) => return,
        };
        if config.peers.get(peer.key.as_bytes()).is_some_and(|current| Arc::ptr_eq(current, peer)) {
            self.sessions.write().insert(index, peer.clone());
        }
    }

    /// The peer for which a message is meant.
    pub(crate) fn recipient(&self, config: &Config, message: &WgKind) -> Option<Arc<Peer>> {
        let index = match message {
            WgKind::HandshakeInit(init) => {
                let Identity { private, public, .. } = config.identity.as_ref()?;
                let half = parse_handshake_anon(private, public, init).ok()?;
                return config.peers.get(&half.peer_static_public).cloned();
            }
            WgKind::HandshakeResp(response) => response.receiver_idx.get(),
            WgKind::CookieReply(reply) => reply.receiver_idx.get(),
            WgKind::Data(data) => data.header.receiver_idx.get(),
        };
        self.sessions.read().get(&index).cloned()
    }

    /// Messages that have to be sent because time has passed. To be called several times a second.
    pub(crate) fn tick(&self, mut send: impl FnMut(WgKind, Endpoint)) {
        self.sessions.write().retain(|index, _| self.indices.in_use(*index));
        let peers: Vec<Arc<Peer>> = self.config().peers.values().cloned().collect();
        for peer in peers {
            let config = self.config();
            let message = peer.tick().filter(|_| config.identity.is_some());
            if let Some((message, _)) = &message {
                self.register(&config, message, &peer);
            }
            drop(config);
            if let Some((message, endpoint)) = message {
                send(message, endpoint);
            }
        }
    }

    /// Sets or removes the private key. The same key again changes nothing; another one, or none, ends all sessions.
    pub(crate) fn set_key(&self, key: Option<[u8; 32]>) {
        let mut config = self.config.write();
        let identity = key.map(Identity::new);
        if identity.as_ref().map(|new| new.public) == config.identity.as_ref().map(|old| old.public) {
            return;
        }
        let unset = Identity::new(UNSET);
        let Identity { private, public, guard } = identity.as_ref().unwrap_or(&unset);
        // The device is not its own peer.
        self.remove(&mut config, public.as_bytes());
        for peer in config.peers.values() {
            peer.set_private(private, *public, guard.calm.clone());
        }
        config.identity = identity;
    }

    /// Applies a change of peers in one step: no packet sees a part of it. Returns what has to be sent.
    pub(crate) fn change_peers(&self, replace: bool, changes: Vec<PeerChange>) -> Vec<(WgKind, Endpoint)> {
        let mut config = self.config.write();
        // Peers that stay keep their sessions and endpoints, and nothing else.
        let mut to_reset = HashSet::new();
        if replace {
            let stays = |change: &&PeerChange| !change.remove && !change.only_existing;
            to_reset.extend(changes.iter().filter(stays).map(|change| change.key));
            let gone: Vec<[u8; 32]> = config.peers.keys().filter(|key| !to_reset.contains(*key)).copied().collect();
            gone.iter().for_each(|key| self.remove(&mut config, key));
        }
        let mut to_dial = Vec::new();
        for mut change in changes {
            if change.remove {
                self.remove(&mut config, &change.key);
                continue;
            }
            let exists = config.peers.contains_key(&change.key);
            if !exists && change.only_existing {
                continue;
            }
            if to_reset.remove(&change.key) && exists {
                change.replace_prefixes = true;
                change.settings.preshared.get_or_insert(None);
                change.settings.keepalive.get_or_insert(0);
            }
            // A new peer is dialled, too: it may continue a session with a previous engine.
            let dials = change.settings.keepalive.is_some_and(|seconds| seconds > 0) || !exists;
            let Some(peer) = self.ensure(&mut config, change.key) else { continue };
            peer.change(change.settings);
            config.set_prefixes(&peer, &change.prefixes, change.replace_prefixes);
            if dials && config.identity.is_some() {
                to_dial.push(peer);
            }
        }
        let initiations = to_dial.iter().filter_map(|peer| {
            let (message, endpoint) = peer.dial()?;
            self.register(&config, &message, peer);
            Some((message, endpoint))
        });
        initiations.collect()
    }

    /// The peer with a key, which is created if it does not exist. None: it is the device's own key.
    fn ensure(&self, config: &mut Config, key: [u8; 32]) -> Option<Arc<Peer>> {
        if let Some(peer) = config.peers.get(&key) {
            return Some(peer.clone());
        }
        // Without a key, nothing is sent; `set_key` sets the peer's.
        let unset;
        let own = match &config.identity {
            Some(own) if own.public.as_bytes() == &key => return None,
            Some(own) => own,
            None => {
                unset = Identity::new(UNSET);
                &unset
            }
        };
        let public = PublicKey::from(key);
        let limiter = own.guard.calm.clone();
        let tunnel = Tunn::new(own.private.clone(), public, None, None, self.indices.clone(), limiter);
        let peer = Arc::new(Peer::new(public, tunnel));
        config.peers.insert(key, peer.clone());
        Some(peer)
    }

    fn remove(&self, config: &mut Config, key: &[u8; 32]) {
        if let Some(peer) = config.peers.remove(key) {
            config.set_prefixes(&peer, &[], true);
            self.sessions.write().retain(|_, other| !Arc::ptr_eq(other, &peer));
        }
    }
}

/// A change of one peer.
pub(crate) struct PeerChange {
    pub(crate) key: [u8; 32],
    pub(crate) remove: bool,
    pub(crate) only_existing: bool,
    pub(crate) settings: Settings,
    /// Prefixes that the peer gets; another peer that has one loses it.
    pub(crate) prefixes: Vec<IpNet>,
    /// Its other prefixes are removed.
    pub(crate) replace_prefixes: bool,
}

impl Config {
    /// The peer whose prefixes contain an address; the longest prefix counts.
    pub(crate) fn route(&self, address: IpAddr) -> Option<&Arc<Peer>> {
        match address {
            IpAddr::V4(v4) => self.v4.get_lpm(&Ipv4Net::from(v4)).map(|(_, peer)| peer),
            IpAddr::V6(v6) => self.v6.get_lpm(&Ipv6Net::from(v6)).map(|(_, peer)| peer),
        }
    }

    fn set_prefixes(&mut self, peer: &Arc<Peer>, prefixes: &[IpNet], replace: bool) {
        let prefixes: BTreeSet<IpNet> = prefixes.iter().map(IpNet::trunc).collect();
        if replace {
            let gone: Vec<IpNet> =
                peer.with_prefixes(|has| has.extract_if(.., |prefix| !prefixes.contains(prefix)).collect());
            gone.iter().for_each(|prefix| drop(self.take(prefix)));
        }
        for prefix in prefixes {
            let previous = match prefix {
                IpNet::V4(v4) => self.v4.insert(v4, peer.clone()),
                IpNet::V6(v6) => self.v6.insert(v6, peer.clone()),
            };
            if let Some(previous) = previous.filter(|previous| !Arc::ptr_eq(previous, peer)) {
                previous.with_prefixes(|has| has.remove(&prefix));
            }
            peer.with_prefixes(|has| has.insert(prefix));
        }
    }

    fn take(&mut self, prefix: &IpNet) -> Option<Arc<Peer>> {
        match prefix {
            IpNet::V4(v4) => self.v4.remove(v4),
            IpNet::V6(v6) => self.v6.remove(v6),
        }
    }
}

impl Lost {
    pub(crate) fn count(counter: &AtomicU64, packets: usize) {
        counter.fetch_add(packets as u64, Ordering::Relaxed);
    }

    /// Logs what was dropped since the last call, if anything was.
    pub(crate) fn report(&self, device: &str) {
        let dropped = [
            &self.no_peer,
            &self.no_endpoint,
            &self.wrong_source,
            &self.malformed,
            &self.not_sent,
            &self.not_delivered,
        ];
        let dropped = dropped.map(|counter| counter.swap(0, Ordering::Relaxed));
        let [no_peer, no_endpoint, wrong_source, malformed, not_sent, not_delivered] = dropped;
        if dropped.iter().any(|packets| *packets > 0) {
            tracing::info!(
                device,
                no_peer,
                no_endpoint,
                wrong_source,
                malformed,
                not_sent,
                not_delivered,
                "packets were dropped"
            );
        }
    }
}
