//! What a plan depends on besides the topology.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr},
};

use ipnet::IpNet;

use crate::state::Preshared;

/// This node, as the drivers observe it before each plan.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Me {
    /// Kubernetes name.
    pub node: String,
    /// MTU of the uplink in bytes.
    pub uplink_mtu: u32,
    /// Largest packet in the tunnel in bytes, if a setting limits it.
    pub tunnel_mtu: Option<u32>,
    /// Prefixes that must never enter the tunnel, whatever a Gateway claims: the API server, the Service range.
    pub protected: BTreeSet<IpNet>,
    /// The subnets of the uplink. A prefix that contains one would take the node off its LAN.
    pub subnets: BTreeSet<IpNet>,
    /// Addresses of the node's devices.
    pub addresses: BTreeSet<IpAddr>,
    /// The node's address, if no device has the one of its Node object.
    pub moved_to: Option<IpAddr>,
    /// The gateway node that intercepted connections go to at present.
    pub intercepting_gateway: Option<Ipv4Addr>,
    /// Preshared key of all tunnels.
    pub preshared: Preshared,
    /// This kernel has IPv6.
    pub ipv6: bool,
}

impl Default for Me {
    fn default() -> Self {
        Self {
            node: String::new(),
            uplink_mtu: 1500,
            tunnel_mtu: None,
            protected: BTreeSet::new(),
            subnets: BTreeSet::new(),
            addresses: BTreeSet::new(),
            moved_to: None,
            intercepting_gateway: None,
            preshared: Preshared::None,
            ipv6: true,
        }
    }
}
