//! The kernel's neighbour tables (ARP and NDP). A packet that Raven has redirected is lost without a counter of its own if
//! the next node's link-layer address cannot be resolved, or if the table is full.

use std::{collections::BTreeSet, net::IpAddr};

use futures::{StreamExt, TryStreamExt};
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourState},
    neighbour_table::{NeighbourTableAttribute, NeighbourTableMessage},
};
use rtnetlink::packet_core::{NLM_F_DUMP, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload};

use super::{Error, Links, failed};

/// What the neighbour tables say.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Neighbours {
    /// Nodes of the pool on a LAN with this one that do not answer, so that packets for them are lost. One that has just
    /// been asked is among them.
    pub unresolved: BTreeSet<IpAddr>,
    /// The table of IPv4 (ARP).
    pub v4: Losses,
    /// The table of IPv6 (NDP).
    pub v6: Losses,
}

/// Counters of one neighbour table since boot, of all devices (ndt_stats, linux/neighbour.h).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Losses {
    /// Addresses that were not resolved.
    pub failures: u64,
    /// New entries that did not fit.
    pub overflows: u64,
}

impl Links {
    /// Reads the neighbour tables. `nodes`: other nodes of the pool.
    pub async fn neighbours(&self, nodes: impl Iterator<Item = IpAddr>) -> Result<Neighbours, Error> {
        let nodes: BTreeSet<IpAddr> = nodes.collect();
        let mut found = Neighbours::default();
        let mut entries = self.handle.neighbours().get().execute();
        while let Some(entry) = entries.try_next().await.map_err(failed("list neighbours"))? {
            if !matches!(entry.header.state, NeighbourState::Failed | NeighbourState::Incomplete) {
                continue;
            }
            let address = entry.attributes.iter().find_map(|attribute| match attribute {
                NeighbourAttribute::Destination(NeighbourAddress::Inet(ip)) => Some(IpAddr::V4(*ip)),
                NeighbourAttribute::Destination(NeighbourAddress::Inet6(ip)) => Some(IpAddr::V6(*ip)),
                _ => None,
            });
            found.unresolved.extend(address.filter(|address| nodes.contains(address)));
        }
        let mut request =
            NetlinkMessage::from(RouteNetlinkMessage::GetNeighbourTable(NeighbourTableMessage::default()));
        request.header.flags = NLM_F_REQUEST | NLM_F_DUMP;
        let action = "read the neighbour tables";
        let mut tables = self.handle.clone().request(request).map_err(failed(action))?;
        while let Some(message) = tables.next().await {
            match message.payload {
                NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewNeighbourTable(table)) => {
                    // Messages about single devices have no counters.
                    let counted = table.attributes.iter().find_map(|attribute| match attribute {
                        NeighbourTableAttribute::Stats(stats) => {
                            Some(Losses { failures: stats.res_failed, overflows: stats.table_fulls })
                        }
                        _ => None,
                    });
                    match (table.header.family, counted) {
                        (AddressFamily::Inet, Some(losses)) => found.v4 = losses,
                        (AddressFamily::Inet6, Some(losses)) => found.v6 = losses,
                        _ => {}
                    }
                }
                NetlinkPayload::Error(e) => return Err(failed(action)(rtnetlink::Error::NetlinkError(e))),
                _ => {}
            }
        }
        Ok(found)
    }
}

impl Neighbours {
    /// Families whose table has overflowed since `before`.
    pub fn overflowed_since(&self, before: &Self) -> impl Iterator<Item = &'static str> {
        [("ipv4", self.v4, before.v4), ("ipv6", self.v6, before.v6)]
            .into_iter()
            .filter(|(_, now, before)| now.overflows > before.overflows)
            .map(|(family, _, _)| family)
    }
}
