//! Filters of TC hooks in the order in which the kernel runs them: a filter before Raven's may end the processing
//! of a packet.

use futures::TryStreamExt;
use netlink_packet_route::tc::{TcAttribute, TcFilterBpfOption, TcMessage, TcOption};

use super::Links;
use crate::names;

impl Links {
    /// Names of the clsact filters that run before Raven's filter with the program `ours`. Empty if that filter
    /// is not attached.
    pub async fn filters_before(&self, device: u32, egress: bool, ours: &str) -> Vec<String> {
        let Ok(index) = i32::try_from(device) else { return Vec::new() };
        let filters = self.handle.traffic_filter(index).get();
        let filters = if egress { filters.egress() } else { filters.ingress() };
        // A device without clsact has no filters.
        let listed: Vec<TcMessage> = filters.execute().try_collect().await.unwrap_or_default();
        // The kernel also lists each priority by itself, with handle 0.
        let filters: Vec<&TcMessage> = listed.iter().filter(|m| u32::from(m.header.handle) != 0).collect();
        let at =
            filters.iter().position(|m| u32::from(m.header.handle) == u32::from(names::TC_HANDLE) && name(m) == ours);
        filters[..at.unwrap_or(0)].iter().map(|m| name(m)).collect()
    }
}

/// Name of the filter's program, or the kind of the filter.
fn name(message: &TcMessage) -> String {
    let options = message
        .attributes
        .iter()
        .find_map(|a| if let TcAttribute::Options(options) = a { Some(options) } else { None });
    let program = options.into_iter().flatten().find_map(|o| match o {
        TcOption::Bpf(TcFilterBpfOption::ProgName(name)) => Some(name.clone()),
        _ => None,
    });
    let kind =
        message.attributes.iter().find_map(|a| if let TcAttribute::Kind(kind) = a { Some(kind.clone()) } else { None });
    program.or(kind).unwrap_or_else(|| "a filter".to_owned())
}
