//! Our two devices: made where they are missing, mended where they differ, never remade for a trifle.

use std::{collections::BTreeSet, fs, net::IpAddr};

use futures::TryStreamExt;
use ipnet::IpNet;
use netlink_packet_route::{
    AddressFamily,
    address::AddressAttribute,
    link::{InfoData, InfoKind, InfoVxlan, LinkAttribute, LinkFlags, LinkInfo, LinkMessage},
};
use raven_common::{OVERLAY_MAC, OVERLAY_PORT};
use rtnetlink::{LinkMessageBuilder, LinkUnspec, LinkVxlan, LinkWireguard};

use super::{Error, Links, attribute, failed, family};
use crate::{names, plan::Overlay};

/// A device as it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// Name.
    pub name: String,
    /// Index.
    pub index: u32,
    /// Bytes.
    pub mtu: u32,
    /// Administratively up.
    pub up: bool,
    /// Link-layer address.
    mac: Vec<u8>,
    /// `wireguard`, `vxlan`, `tun`…
    pub kind: Option<InfoKind>,
    vxlan: Vec<InfoVxlan>,
}

impl From<&LinkMessage> for Found {
    fn from(message: &LinkMessage) -> Self {
        let info = |wanted: fn(&LinkInfo) -> bool| {
            attribute(message, |a| match a {
                LinkAttribute::LinkInfo(infos) => infos.iter().find(|i| wanted(i)).cloned(),
                _ => None,
            })
        };
        let kind = info(|i| matches!(i, LinkInfo::Kind(_))).and_then(|i| if let LinkInfo::Kind(kind) = i { Some(kind) } else { None });
        let vxlan = match info(|i| matches!(i, LinkInfo::Data(InfoData::Vxlan(_)))) {
            Some(LinkInfo::Data(InfoData::Vxlan(infos))) => infos,
            _ => Vec::new(),
        };
        Self {
            name: attribute(message, |a| if let LinkAttribute::IfName(n) = a { Some(n.clone()) } else { None }).unwrap_or_default(),
            index: message.header.index,
            mtu: attribute(message, |a| if let LinkAttribute::Mtu(m) = a { Some(*m) } else { None }).unwrap_or(0),
            up: message.header.flags.contains(LinkFlags::Up),
            mac: attribute(message, |a| if let LinkAttribute::Address(m) = a { Some(m.clone()) } else { None }).unwrap_or_default(),
            kind,
            vxlan,
        }
    }
}

impl Found {
    /// A VXLAN device as ours must be.
    fn is_overlay(&self) -> bool {
        self.kind == Some(InfoKind::Vxlan)
            && self.vxlan.contains(&InfoVxlan::CollectMetadata(true))
            && self.vxlan.contains(&InfoVxlan::Port(OVERLAY_PORT))
    }
}

impl Links {
    /// A device by name, if it is there.
    pub async fn find(&self, name: &str) -> Result<Option<Found>, Error> {
        let mut stream = self.handle.link().get().match_name(name.to_owned()).execute();
        match stream.try_next().await {
            Ok(message) => Ok(message.as_ref().map(Found::from)),
            // ENODEV
            Err(rtnetlink::Error::NetlinkError(e)) if e.raw_code() == -19 => Ok(None),
            Err(e) => Err(failed(format!("look device {name} up"))(e)),
        }
    }

    /// Sees to it that `raven0` is there, and as it should be, all but its addresses; gives its index.
    pub async fn ensure_overlay(&self, want: &Overlay) -> Result<u32, Error> {
        let name = names::OVERLAY;
        let found = match self.find(name).await? {
            Some(found) if found.is_overlay() => found,
            Some(other) => {
                tracing::warn!(ifname = name, kind = ?other.kind, "a device of this name is no overlay of ours; making it anew");
                self.delete_device(name).await?;
                self.add_overlay().await?
            }
            None => self.add_overlay().await?,
        };
        if found.mtu != want.mtu || !found.up || found.mac != OVERLAY_MAC {
            quiet_ipv6(name);
            // The address can only be changed while the device is down.
            if found.mac != OVERLAY_MAC {
                let message = LinkUnspec::new_with_index(found.index).down().address(OVERLAY_MAC.to_vec()).build();
                self.change(name, message).await?;
            }
            self.change(name, LinkUnspec::new_with_index(found.index).mtu(want.mtu).arp(false).up().build()).await?;
        }
        Ok(found.index)
    }

    async fn add_overlay(&self) -> Result<Found, Error> {
        let message = LinkMessageBuilder::<LinkVxlan>::new(names::OVERLAY)
            .append_info_data(InfoVxlan::CollectMetadata(true))
            .append_info_data(InfoVxlan::Port(OVERLAY_PORT))
            .append_info_data(InfoVxlan::Learning(false))
            .build();
        let action = format!("make device {} (UDP port {OVERLAY_PORT}; is another VXLAN device using it?)", names::OVERLAY);
        self.handle.link().add(message).execute().await.map_err(failed(action))?;
        self.must_find(names::OVERLAY).await
    }

    /// Makes a WireGuard device of the kernel.
    pub async fn add_wireguard(&self, name: &str) -> Result<(), Error> {
        let message = LinkWireguard::new(name).build();
        self.handle.link().add(message).execute().await.map_err(failed(format!("make WireGuard device {name}")))
    }

    /// Sets MTU and up where they differ; gives the index.
    pub async fn ensure_up(&self, name: &str, mtu: u32) -> Result<u32, Error> {
        let found = self.must_find(name).await?;
        if found.mtu != mtu || !found.up {
            quiet_ipv6(name);
            self.change(name, LinkUnspec::new_with_index(found.index).mtu(mtu).up().build()).await?;
        }
        Ok(found.index)
    }

    async fn must_find(&self, name: &str) -> Result<Found, Error> {
        self.find(name).await?.ok_or_else(|| failed(format!("find device {name} again"))(rtnetlink::Error::RequestFailed))
    }

    async fn change(&self, name: &str, message: LinkMessage) -> Result<(), Error> {
        self.handle.link().set(message).execute().await.map_err(failed(format!("change device {name}")))
    }

    /// Removes a device; true if it was there.
    pub async fn delete_device(&self, name: &str) -> Result<bool, Error> {
        let Some(found) = self.find(name).await? else { return Ok(false) };
        self.handle.link().del(found.index).execute().await.map_err(failed(format!("remove device {name}")))?;
        Ok(true)
    }

    /// Gives a device of ours these addresses and no others; true if that was a change.
    pub async fn ensure_addresses(&self, name: &str, index: u32, want: &BTreeSet<IpNet>) -> Result<bool, Error> {
        let (mut have, mut changed) = (BTreeSet::new(), false);
        let mut stream = self.handle.address().get().set_link_index_filter(index).execute();
        while let Some(message) = stream.try_next().await.map_err(failed(format!("list addresses of {name}")))? {
            let ip = message.attributes.iter().find_map(|a| if let AddressAttribute::Address(ip) = a { Some(*ip) } else { None });
            let Some(ip) = ip.filter(|ip| !is_link_local(ip)) else { continue };
            let address = IpNet::new(ip, message.header.prefix_len).unwrap_or_else(|_| IpNet::from(ip));
            if want.contains(&address) {
                have.insert(address);
            } else {
                self.handle.address().del(message).execute().await.map_err(failed(format!("remove address {address} from {name}")))?;
                changed = true;
            }
        }
        for address in want.difference(&have) {
            let mut request = self.handle.address().add(index, address.addr(), address.prefix_len()).replace();
            if family(&address.addr()) == AddressFamily::Inet6 {
                // Nobody else is on this device: no detection of duplicates, the address is usable at once.
                request.message_mut().header.flags |= netlink_packet_route::address::AddressHeaderFlags::Nodad;
            }
            request.execute().await.map_err(failed(format!("add address {address} to {name}")))?;
            changed = true;
        }
        Ok(changed)
    }
}

fn is_link_local(ip: &IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    }
}

/// No link-local address, no router solicitations: nobody would answer, and every one of them would be a counted drop.
fn quiet_ipv6(name: &str) {
    for (key, value) in [("addr_gen_mode", "1"), ("accept_ra", "0"), ("autoconf", "0")] {
        // No IPv6 in this kernel: nothing to quieten.
        let _ = fs::write(format!("/proc/sys/net/ipv6/conf/{name}/{key}"), value);
    }
}

/// What our own devices need: loose source checks (the effective value is the larger of `all` and this one, so 2 wins
/// over a strict `all`), forwarding, for what the fast path leaves to the stack, and IPv6 also on a node that has it switched off: its own
/// devices are its owner's matter, other pools' pods are reached by ours. Gives what could not be set.
pub fn set_sysctls(name: &str) -> Vec<String> {
    let wanted = [("ipv4", "rp_filter", "2"), ("ipv4", "forwarding", "1"), ("ipv6", "disable_ipv6", "0"), ("ipv6", "forwarding", "1")];
    let mut problems = Vec::new();
    for (family, key, value) in wanted {
        let path = format!("/proc/sys/net/{family}/conf/{name}/{key}");
        let Ok(have) = fs::read_to_string(&path) else { continue };
        if have.trim() != value
            && let Err(e) = fs::write(&path, value)
        {
            problems.push(format!("set {path} to {value}: {e}; packets that need the stack are dropped on {name}"));
        }
    }
    problems
}
