//! What a lab consists of: pools, nodes and pods with their addresses. Pure data; [`crate::wire`] builds it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use crate::namespace::Namespace;

/// The control plane's address on the LAN of the cloud pool.
pub const CONTROL_PLANE: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 5);
/// The API server's port, there and on the cloud's public address.
pub const API_PORT: u16 = 6443;
/// Every pod of the cluster, IPv4.
pub const CLUSTER_V4: &str = "10.244.0.0/16";
/// Every pod of the cluster, IPv6.
pub const CLUSTER_V6: &str = "fd00:244::/32";

/// A transport protocol, as nftables writes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

impl Protocol {
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        }
    }
}

/// A port that a pool's router maps from its public address to a host of its LAN.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Forward {
    /// Which protocol.
    pub protocol: Protocol,
    /// The port on the router's public addresses.
    pub public_port: u16,
    /// The host on the LAN, IPv4.
    pub to: Ipv4Addr,
    /// The host on the LAN, IPv6, where it has one.
    pub to_v6: Option<Ipv6Addr>,
    /// The port there.
    pub port: u16,
}

/// How a pool's router translates source addresses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Nat {
    /// The port is kept where it is free, as most home and office routers do.
    #[default]
    PortPreserving,
    /// Another port for each connection, as carrier-grade NAT does.
    RandomPorts,
}

/// Which traffic of its own pods a node's CNI masquerades.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Masquerade {
    /// All that leaves the pod prefixes of the pool, like the bridge plugin's `ipMasq`: pods of other pools, too.
    #[default]
    BeyondPool,
    /// All that leaves the cluster's pod range, like flannel.
    BeyondCluster,
    /// Nothing.
    Never,
}

/// Who writes the masquerade rules of a node's CNI.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MasqueradeBy {
    /// A table of its own in nftables.
    #[default]
    Nftables,
    /// The `nat` table of `iptables` and `ip6tables` (whatever backend that command has).
    Iptables,
    /// The same by the tables that the kernel had before nftables.
    IptablesLegacy,
}

/// What to build: give it to [`crate::LabBuilder`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PoolSpec {
    /// Name of the pool, its namespaces and its Gateway.
    pub name: String,
    /// Its number: the LAN is 10.0.N.0/24 for 0 (the cloud), else 10.N.0.0/24, and fd10:N::/64.
    pub number: u8,
    /// Last byte of the router's public addresses, 198.51.100.X and 2001:db8:ffff::X.
    pub public: u8,
    /// Names of the nodes.
    pub nodes: Vec<String>,
    /// What the router maps from outside to the inside.
    pub forwards: Vec<Forward>,
    /// How it translates what goes out.
    pub nat: Nat,
    /// Number of its LAN, where that is not its own: two sites made of one image have the same addresses.
    pub lan: Option<u8>,
}

impl PoolSpec {
    /// A pool with two nodes, `<short>-a` and `<short>-b`, and nothing mapped to the inside.
    pub fn new(name: &str, short: &str, number: u8, public: u8) -> Self {
        Self {
            name: name.to_owned(),
            number,
            public,
            nodes: vec![format!("{short}-a"), format!("{short}-b")],
            forwards: Vec::new(),
            nat: Nat::default(),
            lan: None,
        }
    }

    /// The three pools that the demo and most tests use: `cloud`, `edge-x` and `edge-y`, two nodes each.
    pub fn three() -> Vec<Self> {
        let mut cloud = Self::new("cloud", "cloud", 0, 10);
        cloud.forwards = vec![
            cloud.forward(Protocol::Udp, 4500, 0),
            cloud.forward(Protocol::Tcp, 10262, 0),
            Forward { protocol: Protocol::Tcp, public_port: API_PORT, to: CONTROL_PLANE, to_v6: None, port: API_PORT },
        ];
        vec![cloud, Self::new("edge-x", "x", 1, 20), Self::new("edge-y", "y", 2, 30)]
    }

    /// Maps a public port to the same port of the pool's n-th node.
    pub fn forward(&self, protocol: Protocol, port: u16, node: usize) -> Forward {
        let (to, to_v6) = (self.lan_v4(host_of(node)), Some(self.lan_v6(host_of(node))));
        Forward { protocol, public_port: port, to, to_v6, port }
    }

    pub(crate) fn lan_v4(&self, host: u8) -> Ipv4Addr {
        Ipv4Addr::new(10, self.lan.unwrap_or(self.number), 0, host)
    }

    pub(crate) fn lan_v6(&self, host: u8) -> Ipv6Addr {
        Ipv6Addr::new(0xfd10, alike(self.number), 0, 0, 0, 0, 0, alike(host))
    }
}

/// Last byte of the LAN address of a pool's n-th node: 11, 12, …
fn host_of(index: usize) -> u8 {
    u8::try_from(index + 11).unwrap_or(u8::MAX)
}

/// The hexadecimal group that reads like the decimal byte: .10 and ::10 are the same host.
fn alike(byte: u8) -> u16 {
    let (hundreds, tens, ones) = (byte / 100, byte / 10 % 10, byte % 10);
    u16::from(hundreds) << 8 | u16::from(tens) << 4 | u16::from(ones)
}

/// A pool of a running lab.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Pool {
    /// What was asked for.
    pub spec: PoolSpec,
    /// The router; its bridge `lan` is the pool's LAN, its `wan` is on the internet.
    pub router: Namespace,
    /// The router's public address.
    pub public_v4: Ipv4Addr,
    /// The router's public address.
    pub public_v6: Ipv6Addr,
}

/// A node of a running lab.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Node {
    /// Name of its Node object.
    pub name: String,
    /// Name of its pool.
    pub pool: String,
    /// Its network and mount namespace.
    pub ns: Namespace,
    /// Where its /var/lib/raven, /run/raven, kubeconfig are seen from outside.
    pub dir: PathBuf,
    /// Its number, unique in the lab: the pod prefixes are 10.244.N.0/24 and fd00:244:N::/64.
    pub number: u8,
    /// Address on the LAN (device `eth0`): the InternalIP.
    pub lan_v4: Ipv4Addr,
    /// Address on the LAN.
    pub lan_v6: Ipv6Addr,
    /// Its pods.
    pub pods: Vec<Pod>,
}

impl Node {
    /// Its pod prefix, IPv4.
    pub fn pod_cidr_v4(&self) -> String {
        format!("10.244.{}.0/24", self.number)
    }

    /// Its pod prefix, IPv6.
    pub fn pod_cidr_v6(&self) -> String {
        format!("fd00:244:{}::/64", self.number)
    }

    /// The address of its bridge of pods: in its pod prefix, and its own.
    pub fn bridge_v4(&self) -> Ipv4Addr {
        self.pod_v4(1)
    }

    pub(crate) fn pod_v4(&self, host: u8) -> Ipv4Addr {
        Ipv4Addr::new(10, 244, self.number, host)
    }

    pub(crate) fn pod_v6(&self, host: u8) -> Ipv6Addr {
        Ipv6Addr::new(0xfd00, 0x244, alike(self.number), 0, 0, 0, 0, alike(host))
    }
}

/// A pod of a running lab: a namespace with one device, `eth0`, on its node's bridge `cni0`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Pod {
    /// `<node>-pod<n>`.
    pub name: String,
    /// Its node.
    pub node: String,
    /// Its network namespace.
    pub ns: Namespace,
    /// Its address.
    pub v4: Ipv4Addr,
    /// Its address.
    pub v6: Ipv6Addr,
}

impl Pod {
    /// Both addresses.
    pub fn addresses(&self) -> [IpAddr; 2] {
        [self.v4.into(), self.v6.into()]
    }
}

/// All namespaces of a lab.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Site {
    /// The lab's id, the prefix of all its names.
    pub id: String,
    /// The lab's folder.
    pub dir: PathBuf,
    /// The internet: bridge `wire`, 198.51.100.1 and 2001:db8:ffff::1.
    pub inet: Namespace,
    /// etcd, the API server and the controller, on the cloud's LAN.
    pub control_plane: Namespace,
    /// This machine's end of the line to the control plane.
    pub host_link: HostLink,
    /// The pools; the first is the cloud.
    pub pools: Vec<Pool>,
    /// The nodes of all pools.
    pub nodes: Vec<Node>,
    /// Which pod traffic the nodes masquerade.
    pub masquerade: Masquerade,
    /// By which command.
    pub masquerade_by: MasqueradeBy,
}

/// The line between the root namespace and the control plane, so that kubectl works on the host.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct HostLink {
    /// Device in the root namespace.
    pub device: String,
    /// Its address, /30.
    pub host: Ipv4Addr,
    /// The control plane's address, /30.
    pub control_plane: Ipv4Addr,
}

impl HostLink {
    /// The link of a lab: the lab's number picks one of 169.254.0.0/16's /30 networks, so no two labs share one.
    pub(crate) fn new(id: &str, number: u16) -> Self {
        let base = u32::from(Ipv4Addr::new(169, 254, 0, 0)) + (u32::from(number) << 2);
        Self { device: format!("{id}h"), host: (base + 1).into(), control_plane: (base + 2).into() }
    }
}

impl Site {
    pub(crate) fn plan(id: &str, dir: PathBuf, link: HostLink, pools: &[PoolSpec], pods_per_node: u8) -> Result<Self> {
        let mut site = Self {
            id: id.to_owned(),
            inet: Namespace::new(format!("{id}-inet")),
            control_plane: Namespace::new(format!("{id}-cp")),
            host_link: link,
            pools: Vec::new(),
            nodes: Vec::new(),
            masquerade: Masquerade::default(),
            masquerade_by: MasqueradeBy::default(),
            dir,
        };
        for spec in pools {
            for (index, name) in spec.nodes.iter().enumerate() {
                let number = u8::try_from(site.nodes.len() + 1).context("more than 255 nodes")?;
                ensure!(site.nodes.iter().all(|n| n.name != *name), "two nodes are called {name}");
                let node = site.plan_node(spec, name, index, number, pods_per_node);
                site.nodes.push(node);
            }
            site.pools.push(Pool {
                spec: spec.clone(),
                router: Namespace::new(format!("{id}-{}-router", spec.name)),
                public_v4: Ipv4Addr::new(198, 51, 100, spec.public),
                public_v6: Ipv6Addr::new(0x2001, 0xdb8, 0xffff, 0, 0, 0, 0, alike(spec.public)),
            });
        }
        Ok(site)
    }

    fn plan_node(&self, pool: &PoolSpec, name: &str, index: usize, number: u8, pods: u8) -> Node {
        let dir = self.dir.join("nodes").join(name);
        let ns = Namespace { name: format!("{}-{name}", self.id), mount: Some(dir.join("mnt")) };
        let mut node = Node {
            name: name.to_owned(),
            pool: pool.name.clone(),
            ns,
            dir,
            number,
            lan_v4: pool.lan_v4(host_of(index)),
            lan_v6: pool.lan_v6(host_of(index)),
            pods: Vec::new(),
        };
        node.pods = (0..pods)
            .map(|n| Pod {
                name: format!("{name}-pod{n}"),
                node: name.to_owned(),
                ns: Namespace::new(format!("{}-{name}-pod{n}", self.id)),
                v4: node.pod_v4(10 + n),
                v6: node.pod_v6(10 + n),
            })
            .collect();
        node
    }

    /// The cloud pool: the first.
    pub fn cloud(&self) -> &Pool {
        &self.pools[0]
    }

    /// A pool by name. Panics when there is none: a test that names it wrongly is wrong itself.
    pub fn pool(&self, name: &str) -> &Pool {
        self.pools.iter().find(|p| p.spec.name == name).unwrap_or_else(|| panic!("the lab has no pool {name}"))
    }

    /// A node by name. Panics when there is none.
    pub fn node(&self, name: &str) -> &Node {
        self.nodes.iter().find(|n| n.name == name).unwrap_or_else(|| panic!("the lab has no node {name}"))
    }

    /// The first pod of a node, by the node's name. Panics when there is none.
    pub fn pod(&self, node: &str) -> &Pod {
        self.node(node).pods.first().unwrap_or_else(|| panic!("node {node} has no pod"))
    }

    /// The nodes of a pool.
    pub fn nodes_of(&self, pool: &str) -> impl Iterator<Item = &Node> {
        self.nodes.iter().filter(move |n| n.pool == pool)
    }

    /// All namespaces, the innermost first.
    pub fn namespaces(&self) -> Vec<&Namespace> {
        let pods = self.nodes.iter().flat_map(|n| n.pods.iter().map(|p| &p.ns));
        let nodes = self.nodes.iter().map(|n| &n.ns);
        let routers = self.pools.iter().map(|p| &p.router);
        pods.chain(nodes).chain([&self.control_plane]).chain(routers).chain([&self.inet]).collect()
    }
}
