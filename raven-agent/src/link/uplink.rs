//! The device that faces the pool's LAN: the one by which the kernel's routes reach the pool's other nodes.
//!
//! Mostly it is the device that has the node's address. It is another one if the address is on a loopback or dummy
//! device (BGP to the host), or if the node is its site's router and the members are on its inner side.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use futures::TryStreamExt;
use ipnet::IpNet;
use netlink_packet_route::address::AddressAttribute;
use tokio::time::{Duration, Instant};

use super::{
    Error, Hop, Links,
    device::{self, LOOPBACK},
    failed,
};
use crate::names;

/// Routes are looked up again after this time, which is less than the period of runs. A pool with thousands of nodes needs
/// a tenth of a second for it, and most runs are caused by changes elsewhere. A change of the uplink or of an address
/// causes it at once.
const KEPT: Duration = Duration::from_secs(20);

/// The device that faces the pool's LAN.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Uplink {
    /// Device name.
    pub name: String,
    /// Interface index.
    pub index: u32,
    /// Smallest MTU in bytes of the devices by which this node reaches its pool.
    pub mtu: u32,
    /// The subnets of these devices.
    pub subnets: BTreeSet<IpNet>,
    /// The addresses of all devices.
    pub node_addresses: BTreeSet<IpAddr>,
    /// Other devices by which nodes of the pool are reached.
    pub other_devices: Vec<NetDevice>,
    /// The device of the default route, if no node of the pool is reached by it: this node is its site's router, and
    /// WireGuard's packets arrive there. `None` if it has no Ethernet header (PPP, LTE), because the programs need one.
    pub wan: Option<NetDevice>,
    /// The other nodes, each with the source that the kernel would choose.
    pub sources: Vec<(IpAddr, IpAddr)>,
}

/// Name and index of a network device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetDevice {
    /// Device name.
    pub name: String,
    /// Interface index.
    pub index: u32,
}

impl From<device::Found> for NetDevice {
    fn from(found: device::Found) -> Self {
        Self { name: found.name, index: found.index }
    }
}

impl Uplink {
    /// The devices by which packets of the pool's other nodes arrive, the uplink first.
    pub fn pool_devices(&self) -> Vec<NetDevice> {
        let first = NetDevice { name: self.name.clone(), index: self.index };
        [first].into_iter().chain(self.other_devices.iter().cloned()).collect()
    }
}

/// Finds the uplink, and remembers the looked-up routes.
#[derive(Debug, Default)]
pub struct Uplinks {
    last: Option<Looked>,
}

/// Routes to the other nodes.
#[derive(Clone, Debug)]
struct Looked {
    addresses: Vec<Address>,
    others: Vec<IpAddr>,
    hops: Vec<(IpAddr, Hop)>,
    until: Instant,
}

/// An address of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Address {
    index: u32,
    ip: IpAddr,
    prefix_len: u8,
}

impl Uplinks {
    /// The uplink of a node with `address`, an address of one of its devices. `others` are the nodes that it exchanges
    /// packets with on its side of the tunnel.
    pub async fn find(&mut self, links: &Links, address: IpAddr, others: &[IpAddr]) -> Result<Uplink, Error> {
        // Until the uplink is known, every change of a device may be the one that is waited for.
        let has_changed = links.watch_uplink(address, None);
        let addresses = links.addresses().await?;
        let own = addresses.iter().find(|a| a.ip == address).map(|a| a.index).ok_or(Error::NoUplink(address))?;
        let is_valid = |last: &Looked| {
            !has_changed && last.until > Instant::now() && last.addresses == addresses && last.others == others
        };
        let mut looked = match self.last.take().filter(is_valid) {
            Some(last) => last,
            None => {
                let hops = links.hops(others).await?;
                Looked { addresses, others: others.to_vec(), hops, until: Instant::now() + KEPT }
            }
        };
        let gone = |index: u32| Error::NoRoute { address, device: format!("device {index}, which is gone") };
        let mut index = choose(own, &looked.hops);
        let mut link = links.by_index(index).await?.ok_or_else(|| gone(index))?;
        // The default route leads to the other pools.
        let beyond = links.lookup(anywhere(address)).await?.map(|hop| hop.index).filter(|index| *index != LOOPBACK);
        if looked.hops.is_empty() && !link.has_wire() {
            match beyond {
                Some(beyond) => {
                    index = beyond;
                    link = links.by_index(index).await?.ok_or_else(|| gone(index))?;
                }
                None if others.is_empty() => {}
                None => return Err(Error::NoRoute { address, device: link.name }),
            }
        }
        if links.watch_uplink(address, Some(index)) {
            looked.until = Instant::now();
        }
        let mut mtu = link.mtu;
        let mut used: BTreeSet<u32> = looked.hops.iter().map(|(_, hop)| hop.index).filter(|i| *i != index).collect();
        let mut other_devices = Vec::new();
        for other in &used {
            if let Some(link) = links.by_index(*other).await? {
                mtu = mtu.min(link.mtu);
                other_devices.push(link.into());
            }
        }
        let wan = match beyond.filter(|beyond| *beyond != index && !used.contains(beyond)) {
            Some(beyond) => links.by_index(beyond).await?.filter(device::Found::is_ethernet).map(NetDevice::from),
            None => None,
        };
        used.extend([own, index]);
        let source = |(other, hop): &(IpAddr, Hop)| Some((*other, hop.source?));
        let on_used = looked.addresses.iter().filter(|a| used.contains(&a.index));
        let uplink = Uplink {
            name: link.name,
            index,
            mtu,
            subnets: on_used.filter_map(|a| Some(IpNet::new(a.ip, a.prefix_len).ok()?.trunc())).collect(),
            node_addresses: looked.addresses.iter().map(|a| a.ip).collect(),
            other_devices,
            wan,
            sources: looked.hops.iter().filter_map(source).collect(),
        };
        self.last = Some(looked);
        Ok(uplink)
    }
}

/// An address that no host has (RFC 5737, RFC 3849), in the family of `address`: its route is the default route.
fn anywhere(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(_) => Ipv4Addr::new(192, 0, 2, 1).into(),
        IpAddr::V6(_) => Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1).into(),
    }
}

/// The device with the address, unless all others are reached by other devices: then the one with most of them.
fn choose(own: u32, hops: &[(IpAddr, Hop)]) -> u32 {
    let mut counts = BTreeMap::new();
    hops.iter().for_each(|(_, hop)| *counts.entry(hop.index).or_insert(0_usize) += 1);
    if counts.contains_key(&own) {
        return own;
    }
    let most = counts.iter().max_by_key(|(index, count)| (**count, std::cmp::Reverse(**index)));
    most.map_or(own, |(index, _)| *index)
}

impl Links {
    /// The source of this node's packets to hosts beyond its LAN, in the family of `former`.
    pub async fn own_address(&self, former: IpAddr) -> Option<IpAddr> {
        self.lookup(anywhere(former)).await.ok().flatten().filter(|hop| hop.index != LOOPBACK)?.source
    }

    /// The addresses of all devices.
    async fn addresses(&self) -> Result<Vec<Address>, Error> {
        let mut addresses = Vec::new();
        let mut stream = self.handle.address().get().execute();
        while let Some(message) = stream.try_next().await.map_err(failed("list addresses"))? {
            let find = |wanted: fn(&AddressAttribute) -> Option<IpAddr>| message.attributes.iter().find_map(wanted);
            let local = find(|a| if let AddressAttribute::Local(ip) = a { Some(*ip) } else { None });
            let any = find(|a| if let AddressAttribute::Address(ip) = a { Some(*ip) } else { None });
            if let Some(ip) = local.or(any) {
                addresses.push(Address { index: message.header.index, ip, prefix_len: message.header.prefix_len });
            }
        }
        Ok(addresses)
    }

    /// The routes to these nodes, without those that have none.
    async fn hops(&self, others: &[IpAddr]) -> Result<Vec<(IpAddr, Hop)>, Error> {
        // A node that has just joined this pool has a route into the tunnel until this run deletes it. Another node's address
        // on this node itself is a mistake that the controller reports.
        let mut wrong = vec![LOOPBACK];
        for name in [names::OVERLAY, names::TUNNEL] {
            wrong.extend(self.find(name).await?.map(|device| device.index));
        }
        let mut hops = Vec::new();
        for other in others {
            if let Some(hop) = self.lookup(*other).await?.filter(|hop| !wrong.contains(&hop.index)) {
                hops.push((*other, hop));
            }
        }
        Ok(hops)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uplink_is_the_device_of_the_address_or_the_one_with_most_nodes() {
        let hops = |indexes: &[u32]| -> Vec<(IpAddr, Hop)> {
            let hop = |index: &u32| (IpAddr::from([10, 0, 0, 1]), Hop { index: *index, table: None, source: None });
            indexes.iter().map(hop).collect()
        };
        assert_eq!(choose(2, &hops(&[])), 2, "alone in its pool");
        assert_eq!(choose(2, &hops(&[3, 3, 2])), 2, "one node on its own device");
        assert_eq!(choose(2, &hops(&[3, 4, 4])), 4, "most nodes");
        assert_eq!(choose(2, &hops(&[4, 3])), 3, "always the same of two");
    }
}
