//! Raven's two devices: created when missing, changed in place where possible, recreated only when they are of
//! the wrong kind.

use std::{collections::BTreeSet, fs, net::IpAddr, path::Path};

use futures::TryStreamExt;
use ipnet::IpNet;
use netlink_packet_route::{
    AddressFamily,
    address::AddressAttribute,
    link::{
        AfSpecInet, AfSpecInet6, AfSpecUnspec, In6AddrGenMode, InetDevConf, InfoData, InfoKind, InfoVxlan,
        LinkAttribute, LinkFlags, LinkInfo, LinkMessage,
    },
};
use raven_common::{OVERLAY_MAC, OVERLAY_PORT};
use rtnetlink::{LinkGetRequest, LinkMessageBuilder, LinkUnspec, LinkVxlan, LinkWireguard};

use super::{Error, Links, attribute, failed, family};
use crate::{
    names,
    state::{Change, Overlay},
};

/// Index of the loopback device in every network namespace (`LOOPBACK_IFINDEX`).
pub(super) const LOOPBACK: u32 = 1;

/// A device in the kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// Device name.
    pub name: String,
    /// Interface index.
    pub index: u32,
    /// MTU in bytes.
    pub mtu: u32,
    /// Administratively up.
    pub up: bool,
    mac: Vec<u8>,
    /// Kind of a virtual device: `wireguard`, `vxlan`, `tun`…
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
        let kind = info(|i| matches!(i, LinkInfo::Kind(_)))
            .and_then(|i| if let LinkInfo::Kind(kind) = i { Some(kind) } else { None });
        let vxlan = match info(|i| matches!(i, LinkInfo::Data(InfoData::Vxlan(_)))) {
            Some(LinkInfo::Data(InfoData::Vxlan(infos))) => infos,
            _ => Vec::new(),
        };
        Self {
            name: attribute(message, |a| if let LinkAttribute::IfName(n) = a { Some(n.clone()) } else { None })
                .unwrap_or_default(),
            index: message.header.index,
            mtu: attribute(message, |a| if let LinkAttribute::Mtu(m) = a { Some(*m) } else { None }).unwrap_or(0),
            up: message.header.flags.contains(LinkFlags::Up),
            mac: attribute(message, |a| if let LinkAttribute::Address(m) = a { Some(m.clone()) } else { None })
                .unwrap_or_default(),
            kind,
            vxlan,
        }
    }
}

impl Found {
    /// Kind of a virtual device as `ip -d link` shows it; `physical` for any other.
    pub fn kind_name(&self) -> String {
        self.kind.as_ref().map_or_else(|| "physical".to_owned(), ToString::to_string)
    }

    /// False for a loopback or dummy device, whose packets reach no other host.
    pub(super) fn has_wire(&self) -> bool {
        self.index != LOOPBACK && self.kind != Some(InfoKind::Dummy)
    }

    /// True if its packets have an Ethernet header.
    pub(super) fn is_ethernet(&self) -> bool {
        self.mac.len() == 6
    }

    /// True for a VXLAN device with the overlay's settings, which the kernel cannot change later.
    fn is_overlay(&self) -> bool {
        self.kind == Some(InfoKind::Vxlan)
            && self.vxlan.contains(&InfoVxlan::CollectMetadata(true))
            && self.vxlan.contains(&InfoVxlan::Port(OVERLAY_PORT))
    }
}

impl Links {
    /// The device with this name, if it exists.
    pub async fn find(&self, name: &str) -> Result<Option<Found>, Error> {
        read(self.handle.link().get().match_name(name.to_owned()), format!("look up device {name}")).await
    }

    /// Ensures that `raven0` exists with the desired settings, except its addresses; returns its index.
    pub async fn ensure_overlay(&self, want: &Overlay) -> Result<u32, Error> {
        let name = names::OVERLAY;
        let found = match self.find(name).await? {
            Some(found) if found.is_overlay() => found,
            Some(other) => {
                tracing::warn!(
                    ifname = name,
                    kind = other.kind_name(),
                    "a device of another kind has the overlay's name; recreating it"
                );
                self.delete_device(name).await?;
                self.add_overlay().await?
            }
            None => self.add_overlay().await?,
        };
        if found.mtu != want.mtu || !found.up || found.mac != OVERLAY_MAC {
            self.disable_ipv6_autoconfiguration(name, found.index).await;
            // The kernel changes the address only while the device is down.
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
        let action =
            format!("create device {} (UDP port {OVERLAY_PORT}; does another VXLAN device use it?)", names::OVERLAY);
        self.handle.link().add(message).execute().await.map_err(failed(action))?;
        self.must_find(names::OVERLAY).await
    }

    /// Creates a WireGuard device in the kernel.
    pub async fn add_wireguard(&self, name: &str) -> Result<(), Error> {
        let message = LinkWireguard::new(name).build();
        self.handle.link().add(message).execute().await.map_err(failed(format!("create WireGuard device {name}")))
    }

    /// Reports whether the kernel has WireGuard, by a device that exists only for this test.
    pub async fn has_wireguard(&self, probe: &str) -> Result<bool, Error> {
        self.delete_device(probe).await?;
        match self.add_wireguard(probe).await {
            Ok(()) => self.delete_device(probe).await.map(|_| true),
            Err(e) if e.is_unsupported() => Ok(false),
            Err(e) => Err(e),
        }
    }

    /// Ensures that a device is up with this MTU (bytes); returns its index.
    pub async fn ensure_up(&self, name: &str, mtu: u32) -> Result<u32, Error> {
        let found = self.must_find(name).await?;
        if found.mtu != mtu || !found.up {
            self.disable_ipv6_autoconfiguration(name, found.index).await;
            self.change(name, LinkUnspec::new_with_index(found.index).mtu(mtu).up().build()).await?;
        }
        Ok(found.index)
    }

    /// Disables link-local addresses and router solicitations: no host on the device answers them, and each would be
    /// a counted drop.
    async fn disable_ipv6_autoconfiguration(&self, name: &str, index: u32) {
        let none = AfSpecUnspec::Inet6(vec![AfSpecInet6::AddrGenMode(In6AddrGenMode::None)]);
        // Fails only in a kernel without IPv6, where there is nothing to disable.
        let _ = self.change(name, for_family(index, none)).await;
    }

    /// Sets what Raven's own devices need: loose source checks (the effective value is the maximum of `all` and this one,
    /// so 2 overrides a strict `all`); forwarding, for packets that the fast path leaves to the stack; and IPv6 also on
    /// a node that disables it on its own devices. IPv6 has no forwarding per device.
    ///
    /// Over netlink, because containers have /proc/sys read-only. Only `disable_ipv6` is a file.
    pub async fn ensure_forwarding(&self, name: &str, index: u32) -> Result<(), Error> {
        let path = |family: &str, key: &str| format!("/proc/sys/net/{family}/conf/{name}/{key}");
        let is = |family, key, wanted: &str| fs::read_to_string(path(family, key)).is_ok_and(|v| v.trim() == wanted);
        if !is("ipv4", "rp_filter", "2") || !is("ipv4", "forwarding", "1") {
            let mut wanted = InetDevConf::default();
            (wanted.rp_filter, wanted.forwarding) = (2, 1);
            let wanted = AfSpecUnspec::Inet(vec![AfSpecInet::DevConfRequest(wanted)]);
            self.change(name, for_family(index, wanted)).await?;
        }
        if is("ipv6", "disable_ipv6", "1") {
            let folder = Some(names::WRITABLE_SYSCTLS).filter(|folder| Path::new(folder).exists());
            let path = format!("{}/ipv6/conf/{name}/disable_ipv6", folder.unwrap_or("/proc/sys/net"));
            fs::write(&path, "0").map_err(|reason| Error::Ipv6Disabled { path, reason })?;
        }
        Ok(())
    }

    async fn must_find(&self, name: &str) -> Result<Found, Error> {
        self.find(name)
            .await?
            .ok_or_else(|| failed(format!("find device {name} after its creation"))(rtnetlink::Error::RequestFailed))
    }

    async fn change(&self, name: &str, message: LinkMessage) -> Result<(), Error> {
        self.handle.link().set(message).execute().await.map_err(failed(format!("change device {name}")))
    }

    /// Deletes a device, if it exists.
    pub async fn delete_device(&self, name: &str) -> Result<Change, Error> {
        let Some(found) = self.find(name).await? else { return Ok(Change::NONE) };
        self.handle.link().del(found.index).execute().await.map_err(failed(format!("delete device {name}")))?;
        Ok(Change::ONE)
    }

    /// Ensures that a device has these addresses and no others, link-local ones aside.
    pub async fn ensure_addresses(&self, name: &str, index: u32, want: &BTreeSet<IpNet>) -> Result<Change, Error> {
        let (mut have, mut change) = (BTreeSet::new(), Change::NONE);
        let mut stream = self.handle.address().get().set_link_index_filter(index).execute();
        while let Some(message) = stream.try_next().await.map_err(failed(format!("list addresses of {name}")))? {
            let ip = message
                .attributes
                .iter()
                .find_map(|a| if let AddressAttribute::Address(ip) = a { Some(*ip) } else { None });
            let Some(ip) = ip.filter(|ip| !is_link_local(ip)) else { continue };
            let address = IpNet::new(ip, message.header.prefix_len).unwrap_or_else(|_| IpNet::from(ip));
            if want.contains(&address) {
                have.insert(address);
            } else {
                self.handle
                    .address()
                    .del(message)
                    .execute()
                    .await
                    .map_err(failed(format!("delete address {address} from {name}")))?;
                change += Change::ONE;
            }
        }
        for address in want.difference(&have) {
            let mut request = self.handle.address().add(index, address.addr(), address.prefix_len()).replace();
            if family(&address.addr()) == AddressFamily::Inet6 {
                // The device has no other hosts: without duplicate address detection the address is usable at once.
                request.message_mut().header.flags |= netlink_packet_route::address::AddressHeaderFlags::Nodad;
            }
            request.execute().await.map_err(failed(format!("add address {address} to {name}")))?;
            change += Change::ONE;
        }
        Ok(change)
    }
}

/// The requested device, if it exists.
pub(super) async fn read(request: LinkGetRequest, action: String) -> Result<Option<Found>, Error> {
    match request.execute().try_next().await {
        Ok(message) => Ok(message.as_ref().map(Found::from)),
        // ENODEV
        Err(rtnetlink::Error::NetlinkError(e)) if e.raw_code() == -19 => Ok(None),
        Err(e) => Err(failed(action)(e)),
    }
}

/// A change of a device's settings of one address family.
fn for_family(index: u32, settings: AfSpecUnspec) -> LinkMessage {
    LinkUnspec::new_with_index(index).append_extra_attribute(LinkAttribute::AfSpecUnspec(vec![settings])).build()
}

fn is_link_local(ip: &IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    }
}
