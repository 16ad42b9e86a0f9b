//! Deletes connections of this node's pods that keep a wrong source.
//!
//! The first packet of a connection determines its source. Connections that began while Raven's exemption from source
//! NAT did not exist (before the first start, after a reboot, after `nft flush ruleset`) may have got another source from
//! the CNI. UDP connections that never pause keep it for ever: their packets are dropped, or arrive as packets of the node.
//! After the entry is deleted, the next packet begins a new connection. (The kernel itself deletes entries of
//! MASQUERADE when the output device changes, but not those of SNAT.)

use std::{io, net::IpAddr};

use ipnet::IpNet;
use netlink_packet_netfilter::{
    NetfilterMessageInner, NetfilterProtoFamily,
    conntrack::{ConntrackAttribute, ConntrackMessage, IPTuple, ProtoTuple, Protocol, Tuple},
};
use prefix_trie::joint::JointPrefixMap;
use rtnetlink::packet_core::Nla;

use crate::{nfnetlink::Nfnetlink, state::Change};

/// A request to the kernel's connection tracking failed.
#[derive(Debug, thiserror::Error)]
#[error(
    "cannot {action}: {reason}; UDP connections to other pools that began before Raven may keep a wrong source: restart \
     their clients"
)]
pub struct Error {
    action: &'static str,
    reason: io::Error,
}

type Entry = Vec<ConntrackAttribute>;

/// Deletes the connections from `own` prefixes to `remote` ones that have a wrong source.
pub async fn forget_masqueraded(own: &[IpNet], remote: impl IntoIterator<Item = IpNet>) -> Result<Change, Error> {
    let failed = |action| move |reason| Error { action, reason };
    let prefixes = Prefixes { own: set(own.iter().copied()), remote: set(remote) };
    let kernel = Nfnetlink::connect().map_err(failed("open a netlink socket"))?;
    let mut wrong = Vec::new();
    let keep_wrong = |object| {
        if let NetfilterMessageInner::Conntrack(ConntrackMessage::New(entry)) = object
            && prefixes.is_wrong(&entry)
        {
            wrong.push(entry);
        }
    };
    kernel.list(ConntrackMessage::Get(Vec::new()), keep_wrong).await.map_err(failed("list conntrack entries"))?;
    let mut change = Change::NONE;
    for entry in wrong {
        change += Change::unless_missing(delete(&kernel, entry).await).map_err(failed("delete a conntrack entry"))?;
    }
    Ok(change)
}

async fn delete(kernel: &Nfnetlink, entry: Entry) -> io::Result<()> {
    let family = match original(&entry) {
        Some((IpAddr::V4(_), _)) => NetfilterProtoFamily::IPv4,
        _ => NetfilterProtoFamily::IPv6,
    };
    // The original tuple and the zone, if there is one, identify the entry.
    let key = entry.into_iter().filter(|a| matches!(a, ConntrackAttribute::CtaTupleOrig(_)) || is_zone(a)).collect();
    kernel.change(family, ConntrackMessage::Delete(key)).await
}

struct Prefixes {
    own: JointPrefixMap<IpNet, ()>,
    remote: JointPrefixMap<IpNet, ()>,
}

impl Prefixes {
    fn is_wrong(&self, entry: &[ConntrackAttribute]) -> bool {
        let within = |prefixes: &JointPrefixMap<IpNet, ()>, ip: IpAddr| prefixes.get_lpm(&IpNet::from(ip)).is_some();
        let (Some((pod, dialled)), Some((server, answered))) = (original(entry), reply(entry)) else { return false };
        if answered == pod || !within(&self.own, pod) || !within(&self.remote, server) {
            return false;
        }
        // A source inside the node's prefix works, so only UDP is moved to the pod's: a TCP connection would break. Where
        // the destination was changed, too, kube-proxy may have chosen the source.
        !within(&self.own, answered) || (is_udp(entry) && dialled == server)
    }
}

fn set(prefixes: impl IntoIterator<Item = IpNet>) -> JointPrefixMap<IpNet, ()> {
    prefixes.into_iter().map(|prefix| (prefix, ())).collect()
}

/// Source and destination of the first packet.
fn original(entry: &[ConntrackAttribute]) -> Option<(IpAddr, IpAddr)> {
    addresses(original_tuple(entry)?)
}

fn is_udp(entry: &[ConntrackAttribute]) -> bool {
    let protocol =
        |part: &Tuple| matches!(part, Tuple::Proto(parts) if parts.contains(&ProtoTuple::Protocol(Protocol::Udp)));
    original_tuple(entry).is_some_and(|tuple| tuple.iter().any(protocol))
}

fn original_tuple(entry: &[ConntrackAttribute]) -> Option<&[Tuple]> {
    entry
        .iter()
        .find_map(|a| if let ConntrackAttribute::CtaTupleOrig(tuple) = a { Some(tuple.as_slice()) } else { None })
}

/// Source and destination of answers. Source NAT changes the destination, destination NAT the source.
fn reply(entry: &[ConntrackAttribute]) -> Option<(IpAddr, IpAddr)> {
    entry.iter().find_map(|a| if let ConntrackAttribute::CtaTupleReply(tuple) = a { addresses(tuple) } else { None })
}

fn addresses(tuple: &[Tuple]) -> Option<(IpAddr, IpAddr)> {
    let addresses =
        tuple.iter().find_map(|part| if let Tuple::Ip(addresses) = part { Some(addresses) } else { None })?;
    let source = addresses.iter().find_map(|a| if let IPTuple::SourceAddress(ip) = a { Some(*ip) } else { None })?;
    let destination =
        addresses.iter().find_map(|a| if let IPTuple::DestinationAddress(ip) = a { Some(*ip) } else { None })?;
    Some((source, destination))
}

fn is_zone(attribute: &ConntrackAttribute) -> bool {
    const CTA_ZONE: u16 = 18;
    matches!(attribute, ConntrackAttribute::Other(other) if other.kind() == CTA_ZONE)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(protocol: Protocol, pod: &str, dialled: &str, server: &str, answered: &str) -> Entry {
        let tuple = |source: &str, destination: &str| {
            let ip = |text: &str| text.parse().expect("an address");
            vec![
                Tuple::Ip(vec![IPTuple::SourceAddress(ip(source)), IPTuple::DestinationAddress(ip(destination))]),
                Tuple::Proto(vec![ProtoTuple::Protocol(protocol)]),
            ]
        };
        vec![
            ConntrackAttribute::CtaTupleOrig(tuple(pod, dialled)),
            ConntrackAttribute::CtaTupleReply(tuple(server, answered)),
        ]
    }

    #[test]
    fn only_connections_to_other_pools_that_lost_their_pods_address_are_wrong() {
        let prefix = |text: &str| text.parse().expect("a prefix");
        let prefixes = Prefixes {
            own: set([prefix("10.244.1.0/24"), prefix("fd00:1::/64")]),
            remote: set([prefix("10.244.2.0/24"), prefix("fd00:2::/64")]),
        };
        let wrong = |protocol, pod, dialled, server, answered| {
            prefixes.is_wrong(&entry(protocol, pod, dialled, server, answered))
        };
        for protocol in [Protocol::Udp, Protocol::Tcp] {
            assert!(wrong(protocol, "10.244.1.5", "10.244.2.5", "10.244.2.5", "192.168.0.2"));
            assert!(wrong(protocol, "fd00:1::5", "fd00:2::5", "fd00:2::5", "2001:db8::2"));
            assert!(wrong(protocol, "10.244.1.5", "10.96.0.10", "10.244.2.5", "192.168.0.2"), "to a ClusterIP");
            assert!(!wrong(protocol, "10.244.1.5", "10.244.2.5", "10.244.2.5", "10.244.1.5"));
            assert!(!wrong(protocol, "10.244.1.5", "10.96.0.10", "10.244.2.5", "10.244.1.0"), "kube-proxy's");
            assert!(!wrong(protocol, "10.244.1.5", "1.1.1.1", "1.1.1.1", "192.168.0.2"), "to the internet");
            assert!(!wrong(protocol, "192.168.0.2", "10.244.2.5", "10.244.2.5", "192.168.0.2"), "of a host process");
        }
        assert!(wrong(Protocol::Udp, "10.244.1.5", "10.244.2.5", "10.244.2.5", "10.244.1.0"), "as packets of the node");
        assert!(!wrong(Protocol::Tcp, "10.244.1.5", "10.244.2.5", "10.244.2.5", "10.244.1.0"), "works until it ends");
        assert!(!prefixes.is_wrong(&[]));
    }
}
