//! The topology: an immutable snapshot of who belongs to which pool and how pools are reached. Everything an agent does
//! is a function of it.
//!
//! Receives API objects by way of [`build`]; gives checked types. Nothing here does I/O or reads a clock.

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
    build::{Inputs, build},
    key::{PresharedKey, PublicKey},
    settings::{AGENT_CONFIG, SWITCHES, Settings},
};

/// All pools, by name of their Gateway.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Topology {
    /// Pools by name.
    pub pools: BTreeMap<String, Pool>,
    /// What was left out, and why: one sentence each, naming the resource.
    pub problems: Vec<String>,
    /// Where the API server is: never into the tunnel.
    pub api_servers: BTreeSet<IpAddr>,
    /// Cluster-wide settings.
    pub settings: Settings,
    /// Ports of nodes that the L7 path reaches.
    pub ports: Ports,
    /// Certificates (PEM) of the CA that signs the proxies' certificates; empty until the controller has published one.
    pub proxy_ca: String,
}

/// The nodes of one Gateway.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pool {
    /// Others dial its gateway nodes; packets between two pools that cannot dial each other pass through it.
    pub exposed: bool,
    /// Nodes by name.
    pub members: BTreeMap<String, Member>,
    /// Elected gateway nodes of the tunnel, by node name.
    pub gateways: BTreeMap<String, GatewayPeer>,
    /// Elected gateway nodes of the L7 proxy, by node name.
    pub proxies: BTreeMap<String, ProxyPeer>,
}

/// One node of a pool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Outer address of overlay packets.
    pub outer: Ipv4Addr,
    /// Its prefixes, canonical, of both families; no prefix of another pool overlaps them.
    pub prefixes: BTreeSet<IpNet>,
}

/// An elected gateway node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GatewayPeer {
    /// Its WireGuard key, once it has published one.
    pub key: Option<PublicKey>,
    /// Where others reach it; `None`: nobody can dial it, it dials.
    pub dial: Option<SocketAddr>,
    /// UDP port that its tunnel listens on.
    pub port: u16,
}

/// An elected gateway node of the L7 proxy.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ProxyPeer {
    /// Host (address or name) and TCP port where others dial it; `None`: nobody can, it dials.
    pub dial: Option<(String, u16)>,
    /// TCP port that it listens on.
    pub port: u16,
    /// It works, as far as it can be seen from outside. Of exposed pools only.
    pub ready: bool,
    /// UID of its Node object, where the controller has told it.
    pub uid: Option<String>,
}

impl Topology {
    /// The pool of a node, by name.
    pub fn pool_of(&self, node: &str) -> Option<(&str, &Pool)> {
        self.pools.iter().find(|(_, pool)| pool.members.contains_key(node)).map(|(name, pool)| (name.as_str(), pool))
    }
}

impl Pool {
    /// Gateway nodes that can be talked to: those that have published a key.
    pub fn usable(&self) -> impl Iterator<Item = (&str, PublicKey, &GatewayPeer)> {
        self.gateways.iter().filter_map(|(name, peer)| Some((name.as_str(), peer.key?, peer)))
    }

    /// True if somebody outside can dial one of its gateway nodes.
    pub fn dialable(&self) -> bool {
        self.usable().any(|(_, _, peer)| peer.dial.is_some())
    }
}
