//! Describes a lab: pools, nodes and pods with their addresses. Pure data; the module `network` builds it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use crate::namespace::Namespace;

/// Address of the control plane on the LAN of the cloud pool.
pub const CONTROL_PLANE: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 5);
/// Its IPv6 address.
pub const CONTROL_PLANE_V6: Ipv6Addr = Ipv6Addr::new(0xfd10, 0, 0, 0, 0, 0, 0, 5);
/// Port of the API server, on its own address and on the cloud's public address.
pub const API_PORT: u16 = 6443;
/// IPv4 range of all pods of the cluster.
pub const CLUSTER_V4: &str = "10.244.0.0/16";
/// IPv6 range of all pods of the cluster.
pub const CLUSTER_V6: &str = "fd00:244::/32";

/// A transport protocol of a port mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// The TCP protocol.
    Tcp,
    /// The UDP protocol.
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

/// A port mapping of a pool's router, from its public address to a host of its LAN.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Forward {
    /// Transport protocol of the mapping.
    pub protocol: Protocol,
    /// Port on the router's public addresses.
    pub public_port: u16,
    /// IPv4 address of the host on the LAN.
    pub to: Ipv4Addr,
    /// IPv6 address of the host on the LAN, if it has one.
    pub to_v6: Option<Ipv6Addr>,
    /// Port on the host.
    pub port: u16,
}

/// Source address translation of a pool's router.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Nat {
    /// Keeps the source port if it is free, as most home and office routers do.
    #[default]
    PortPreserving,
    /// Uses a random source port for each connection, as carrier-grade NAT does.
    RandomPorts,
}

/// Traffic of its pods that a node's CNI masquerades.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Masquerade {
    /// Traffic that leaves the pod prefixes of the pool, including traffic to other pools; as the
    /// bridge plugin with `ipMasq`.
    #[default]
    BeyondPool,
    /// Traffic that leaves the cluster's pod range; as flannel.
    BeyondCluster,
    /// The CNI masquerades nothing.
    Never,
}

/// Tool that writes the masquerade rules of a node's CNI.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MasqueradeBy {
    /// A separate nftables table.
    #[default]
    Nftables,
    /// The `nat` table of `iptables` and `ip6tables`, with the backend of the installed command.
    Iptables,
    /// The `nat` table of `iptables-legacy` and `ip6tables-legacy`.
    IptablesLegacy,
}

/// Configuration of a pool for [`crate::LabBuilder`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PoolSpec {
    /// Name of the pool, its namespaces and its Gateway.
    pub name: String,
    /// Number of the pool. The LAN is 10.0.N.0/24 for 0 (the cloud), else 10.N.0.0/24, and fd10:N::/64.
    pub number: u8,
    /// Last byte of the router's public addresses, 198.51.100.X and 2001:db8:ffff::X.
    pub public: u8,
    /// Names of the nodes.
    pub nodes: Vec<String>,
    /// Port mappings of the router.
    pub forwards: Vec<Forward>,
    /// Source address translation of the router.
    pub nat: Nat,
    /// Number of the LAN if it differs from `number`. Two sites installed from one image have the same addresses.
    pub lan: Option<u8>,
    /// Its nodes have no IPv4 addresses on the LAN. Their pods have both families.
    pub ipv6_only: bool,
}

impl PoolSpec {
    /// Creates a pool with two nodes, `<short>-a` and `<short>-b`, and no port mappings.
    pub fn new(name: &str, short: &str, number: u8, public: u8) -> Self {
        Self {
            name: name.to_owned(),
            number,
            public,
            nodes: vec![format!("{short}-a"), format!("{short}-b")],
            forwards: Vec::new(),
            nat: Nat::default(),
            lan: None,
            ipv6_only: false,
        }
    }

    /// Returns the three pools of the demo and most tests: `cloud`, `edge-x` and `edge-y`, two nodes each.
    pub fn three() -> Vec<Self> {
        let mut cloud = Self::new("cloud", "cloud", 0, 10);
        cloud.forwards = vec![
            cloud.forward(Protocol::Udp, 4500, 0),
            cloud.forward(Protocol::Tcp, 10262, 0),
            Forward {
                protocol: Protocol::Tcp,
                public_port: API_PORT,
                to: CONTROL_PLANE,
                to_v6: Some(CONTROL_PLANE_V6),
                port: API_PORT,
            },
        ];
        vec![cloud, Self::new("edge-x", "x", 1, 20), Self::new("edge-y", "y", 2, 30)]
    }

    /// Returns [`PoolSpec::three`], of which these have only IPv6.
    pub fn three_with_ipv6_only(names: &[&str]) -> Vec<Self> {
        let mut pools = Self::three();
        pools.iter_mut().for_each(|pool| pool.ipv6_only = names.contains(&pool.name.as_str()));
        pools
    }

    /// Returns a mapping of a public port to the same port of the pool's n-th node.
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

/// Returns the last byte of the LAN address of a pool's n-th node: 11, 12, …
fn host_of(index: usize) -> u8 {
    u8::try_from(index + 11).unwrap_or(u8::MAX)
}

/// Returns the hexadecimal group that reads like the decimal byte, so that .10 and ::10 are the same host.
fn alike(byte: u8) -> u16 {
    let (hundreds, tens, ones) = (byte / 100, byte / 10 % 10, byte % 10);
    u16::from(hundreds) << 8 | u16::from(tens) << 4 | u16::from(ones)
}

/// A pool of a running lab.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Pool {
    /// Configuration of the pool.
    pub spec: PoolSpec,
    /// Namespace of the router. Its bridge `lan` is the pool's LAN; its device `wan` is on the internet.
    pub router: Namespace,
    /// Public IPv4 address of the router.
    pub public_v4: Ipv4Addr,
    /// Public IPv6 address of the router.
    pub public_v6: Ipv6Addr,
}

/// A node of a running lab.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Node {
    /// Name of the Node object.
    pub name: String,
    /// Name of the pool.
    pub pool: String,
    /// Network and mount namespace of the node.
    pub ns: Namespace,
    /// Folder on the host with the node's /var/lib/raven (`lib`), /run/raven (`run`) and kubeconfig.
    pub dir: PathBuf,
    /// Number of the node, unique in the lab. The pod prefixes are 10.244.N.0/24 and fd00:244:N::/64.
    pub number: u8,
    /// It has no IPv4 address on the LAN.
    pub ipv6_only: bool,
    /// IPv4 address on the LAN (device `eth0`): the InternalIP, unless [`Node::ipv6_only`].
    pub lan_v4: Ipv4Addr,
    /// IPv6 address on the LAN.
    pub lan_v6: Ipv6Addr,
    /// Pods of the node.
    pub pods: Vec<Pod>,
}

impl Node {
    /// Returns its InternalIPs, first the one by which the pool reaches it.
    pub fn addresses(&self) -> Vec<IpAddr> {
        let ipv4 = (!self.ipv6_only).then_some(IpAddr::from(self.lan_v4));
        ipv4.into_iter().chain([self.lan_v6.into()]).collect()
    }

    /// Returns the IPv4 pod prefix.
    pub fn pod_cidr_v4(&self) -> String {
        format!("10.244.{}.0/24", self.number)
    }

    /// Returns the IPv6 pod prefix.
    pub fn pod_cidr_v6(&self) -> String {
        format!("fd00:244:{}::/64", self.number)
    }

    /// Returns the IPv4 address of the pods' bridge, which is inside the pod prefix and belongs to the node.
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
    /// Name of the pod, `<node>-pod<n>`.
    pub name: String,
    /// Name of the node.
    pub node: String,
    /// Network namespace of the pod.
    pub ns: Namespace,
    /// IPv4 address of the pod.
    pub v4: Ipv4Addr,
    /// IPv6 address of the pod.
    pub v6: Ipv6Addr,
}

impl Pod {
    /// Returns the IPv4 and the IPv6 address.
    pub fn addresses(&self) -> [IpAddr; 2] {
        [self.v4.into(), self.v6.into()]
    }
}

/// Description of a lab with all its namespaces.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Site {
    /// ID of the lab, the prefix of all its names.
    pub id: String,
    /// Folder of the lab.
    pub dir: PathBuf,
    /// Namespace of the internet: bridge `wire`, 198.51.100.1 and 2001:db8:ffff::1.
    pub inet: Namespace,
    /// Namespace of etcd, API server and controller, on the cloud's LAN.
    pub control_plane: Namespace,
    /// Link between this machine and the control plane.
    pub host_link: HostLink,
    /// Pools; the first is the cloud.
    pub pools: Vec<Pool>,
    /// Nodes of all pools.
    pub nodes: Vec<Node>,
    /// Pod traffic that the nodes masquerade.
    pub masquerade: Masquerade,
    /// Tool that writes the masquerade rules.
    pub masquerade_by: MasqueradeBy,
}

/// The link between the root namespace and the control plane, so that kubectl works on the host.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct HostLink {
    /// Name of the device in the root namespace.
    pub device: String,
    /// Address of the host on the link; /30.
    pub host: Ipv4Addr,
    /// Address of the control plane on the link; /30.
    pub control_plane: Ipv4Addr,
}

impl HostLink {
    /// Returns the link of a lab. The lab's number selects one of the /30 networks of 169.254.0.0/16, so labs
    /// do not share one.
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
                ensure!(site.nodes.iter().all(|n| n.name != *name), "two nodes are named {name}");
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
            ipv6_only: pool.ipv6_only,
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

    /// Returns the cloud pool, which is the first one.
    pub fn cloud(&self) -> &Pool {
        &self.pools[0]
    }

    /// Returns a pool by name. Panics if it does not exist, which is an error in the test.
    pub fn pool(&self, name: &str) -> &Pool {
        self.pools.iter().find(|p| p.spec.name == name).unwrap_or_else(|| panic!("the lab has no pool {name}"))
    }

    /// Returns a node by name. Panics if it does not exist.
    pub fn node(&self, name: &str) -> &Node {
        self.nodes.iter().find(|n| n.name == name).unwrap_or_else(|| panic!("the lab has no node {name}"))
    }

    /// Returns the first pod of a node, by the node's name. Panics if it does not exist.
    pub fn pod(&self, node: &str) -> &Pod {
        self.node(node).pods.first().unwrap_or_else(|| panic!("node {node} has no pod"))
    }

    /// Returns the nodes of a pool.
    pub fn nodes_of(&self, pool: &str) -> impl Iterator<Item = &Node> {
        self.nodes.iter().filter(move |n| n.pool == pool)
    }

    /// Returns all namespaces, ordered from pods to the internet.
    pub fn namespaces(&self) -> Vec<&Namespace> {
        let pods = self.nodes.iter().flat_map(|n| n.pods.iter().map(|p| &p.ns));
        let nodes = self.nodes.iter().map(|n| &n.ns);
        let routers = self.pools.iter().map(|p| &p.router);
        pods.chain(nodes).chain([&self.control_plane]).chain(routers).chain([&self.inet]).collect()
    }
}
