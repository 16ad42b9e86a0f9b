//! Filters of TC hooks, in the order in which the kernel asks them: who comes before ours may end a packet's way there.

use futures::TryStreamExt;
use netlink_packet_route::tc::{TcAttribute, TcFilterBpfOption, TcMessage, TcOption};

use super::Links;
use crate::names;

impl Links {
    /// Names of the filters of clsact that are asked before ours, which has the program `ours`. None where ours is not there.
    pub async fn filters_before(&self, device: u32, egress: bool, ours: &str) -> Vec<String> {
        let Ok(index) = i32::try_from(device) else { return Vec::new() };
        let filters = self.handle.traffic_filter(index).get();
        let filters = if egress { filters.egress() } else { filters.ingress() };
        // No clsact there: no filters.
        let listed: Vec<TcMessage> = filters.execute().try_collect().await.unwrap_or_default();
        // Each priority has a line of its own, with no handle.
        let filters: Vec<&TcMessage> = listed.iter().filter(|m| u32::from(m.header.handle) != 0).collect();
        let at = filters.iter().position(|m| u32::from(m.header.handle) == u32::from(names::TC_HANDLE) && name(m) == ours);
        filters[..at.unwrap_or(0)].iter().map(|m| name(m)).collect()
    }
}

/// The program's name, or what kind of filter it is.
fn name(message: &TcMessage) -> String {
    let options = message.attributes.iter().find_map(|a| if let TcAttribute::Options(options) = a { Some(options) } else { None });
    let program = options.into_iter().flatten().find_map(|o| match o {
        TcOption::Bpf(TcFilterBpfOption::ProgName(name)) => Some(name.clone()),
        _ => None,
    });
    let kind = message.attributes.iter().find_map(|a| if let TcAttribute::Kind(kind) = a { Some(kind.clone()) } else { None });
    program.or(kind).unwrap_or_else(|| "a filter".to_owned())
}
