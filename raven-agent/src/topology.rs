//! The topology: an immutable snapshot of pools, their nodes and how they are reached. Every plan is a function of it.
//!
//! [`build()`] turns API objects into these checked types. Nothing here does I/O or reads a clock.

mod build;
mod key;
mod settings;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, SocketAddr},
};

use ipnet::IpNet;
use raven_api::proxy::Ports;

pub use self::{
    build::{Inputs, build, host_names, keep_keys},
    key::{PresharedKey, PublicKey},
    settings::ClusterSettings,
};

/// The cluster as this agent sees it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Topology {
    /// Pools by the name of their Gateway.
    pub pools: BTreeMap<String, Pool>,
    /// Input that was left out and why, one sentence each; it names the resource.
    pub problems: Vec<String>,
    /// Addresses of the API servers, which must never enter the tunnel.
    pub api_servers: BTreeSet<IpAddr>,
    /// Cluster-wide settings.
    pub settings: ClusterSettings,
    /// Ports of nodes that the L7 half reaches.
    pub ports: Ports,
    /// Certificates (PEM) of the CA that signs the proxies' certificates; empty until the controller has published one.
    pub proxy_ca: String,
}

/// The nodes of one Gateway.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pool {
    /// Its gateway nodes are dialled by other pools, and relay between pools that cannot dial each other.
    pub exposed: bool,
    /// L3 is on for this pool (`tunnelConfig.Replicas` is not 0).
    pub l3: bool,
    /// WireGuard also encrypts packets between its gateway nodes and its other nodes.
    pub encrypted: bool,
    /// L7 is on for this pool (`proxyConfig.Replicas` is not 0).
    pub l7: bool,
    /// All nodes, by name.
    pub members: BTreeMap<String, Member>,
    /// Elected gateway nodes of the tunnel, by node name.
    pub gateways: BTreeMap<String, GatewayPeer>,
    /// Elected gateway nodes of the L7 proxy, by node name.
    pub proxies: BTreeMap<String, ProxyPeer>,
}

/// One node of a pool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Its address inside the pool: overlay packets and kubelet connections go there.
    pub address: IpAddr,
    /// Its outer address in maps: `address`, or a stand-in where that is an IPv6 address.
    pub outer: Ipv4Addr,
    /// Its own addresses of both families, with `address`.
    pub addresses: BTreeSet<IpAddr>,
    /// Its prefixes of both families, with host bits zero; no prefix of another pool overlaps them. They include its own
    /// addresses if other pools can reach those.
    pub prefixes: BTreeSet<IpNet>,
    /// Its WireGuard public key, if the pool is encrypted and the node has published one.
    pub key: Option<PublicKey>,
    /// UDP port of its tunnel, if it has one.
    pub tunnel_port: u16,
}

/// An elected gateway node of the tunnel.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GatewayPeer {
    /// Its WireGuard public key, once it has published one.
    pub key: Option<PublicKey>,
    /// Its endpoint; `None` if it cannot be dialled and dials itself.
    pub dial: Option<Dial>,
}

/// Where a gateway node of the tunnel is dialled. Whether it is dialled is the same on all nodes, because both ends of a
/// path must choose the same relay; the address of a name may differ or be missing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Dial {
    /// At an address.
    Address(SocketAddr),
    /// At the address of a name.
    Name {
        /// The name.
        host: String,
        /// UDP port.
        port: u16,
        /// Its address, as this node's resolver has answered.
        address: Option<IpAddr>,
    },
}

impl Dial {
    /// The address, if it is known.
    pub fn address(&self) -> Option<SocketAddr> {
        match self {
            Self::Address(address) => Some(*address),
            Self::Name { port, address, .. } => address.map(|address| SocketAddr::new(address, *port)),
        }
    }
}

/// An elected gateway node of the L7 proxy.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ProxyPeer {
    /// Host (address or name) and TCP port that edges dial; `None` if it cannot be dialled and dials itself.
    pub dial: Option<(String, u16)>,
    /// TCP port that it listens on.
    pub port: u16,
    /// The proxy works, as edges and the controller observe it. Only set in exposed pools.
    pub ready: bool,
    /// UID of its Node object, if the controller has published it.
    pub uid: Option<String>,
}

impl Member {
    /// A node with one address and no prefixes.
    pub fn new(outer: Ipv4Addr) -> Self {
        let address = outer.into();
        Self {
            address,
            outer,
            addresses: BTreeSet::from([address]),
            prefixes: BTreeSet::new(),
            key: None,
            tunnel_port: raven_api::DEFAULT_TUNNEL_PORT,
        }
    }
}

impl Topology {
    /// The pools that relay, of those that can be dialled: the exposed ones, or all where none is exposed.
    pub fn relays(&self) -> Vec<(&str, &Pool)> {
        let some_exposed = self.pools.values().any(|pool| pool.exposed);
        let dialled = self.pools.iter().filter(|(_, pool)| pool.l3 && pool.dialable());
        dialled.filter(|(_, pool)| pool.exposed || !some_exposed).map(|(name, pool)| (name.as_str(), pool)).collect()
    }

    /// Proxies of the exposed pools other than `own`: Gateway, name and node.
    pub fn other_proxies(&self, own: &str) -> impl Iterator<Item = (&str, &str, &Member)> {
        let others = self.pools.iter().filter(move |(name, pool)| pool.exposed && *name != own);
        others.flat_map(|(name, pool)| {
            let nodes = pool.proxies.keys();
            nodes.filter_map(move |node| Some((name.as_str(), node.as_str(), pool.members.get(node)?)))
        })
    }

    /// Name and pool of the Gateway that a node belongs to.
    pub fn pool_of(&self, node: &str) -> Option<(&str, &Pool)> {
        self.pools.iter().find(|(_, pool)| pool.members.contains_key(node)).map(|(name, pool)| (name.as_str(), pool))
    }
}

impl Default for Pool {
    /// A pool without nodes, with both halves on.
    fn default() -> Self {
        Self {
            exposed: false,
            l3: true,
            encrypted: false,
            l7: true,
            members: BTreeMap::new(),
            gateways: BTreeMap::new(),
            proxies: BTreeMap::new(),
        }
    }
}

impl Pool {
    /// Gateway nodes that have published a key.
    pub fn usable(&self) -> impl Iterator<Item = (&str, PublicKey, &GatewayPeer)> {
        self.gateways.iter().filter_map(|(name, peer)| Some((name.as_str(), peer.key?, peer)))
    }

    /// Addresses of the nodes with which a node exchanges overlay packets: a gateway node with all others, a member
    /// with the gateway nodes.
    pub fn neighbours(&self, node: &str) -> Vec<IpAddr> {
        let is_gateway = self.gateways.contains_key(node);
        let others = self.members.iter().filter(|(name, _)| *name != node);
        let wanted = others.filter(|(name, _)| is_gateway || self.gateways.contains_key(*name));
        wanted.map(|(_, member)| member.address).collect()
    }

    /// True if other pools can dial one of its gateway nodes.
    pub fn dialable(&self) -> bool {
        self.usable().any(|(_, _, peer)| peer.dial.is_some())
    }
}
