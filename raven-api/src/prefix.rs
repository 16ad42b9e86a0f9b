//! Prefixes that no router forwards, and that Raven therefore never accepts from a Gateway or a Node.

use std::net::{Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

/// Prefixes that no router forwards, each with its name. Source: RFC 6890 and the IANA special-purpose registries.
pub const NEVER_ROUTED: [(IpNet, &str); 9] = [
    (v4([0, 0, 0, 0], 8), "'this network'"),
    (v4([127, 0, 0, 0], 8), "loopback"),
    (v4([169, 254, 0, 0], 16), "link-local"),
    (v4([224, 0, 0, 0], 4), "multicast"),
    (v4([255, 255, 255, 255], 32), "broadcast"),
    (v6(Ipv6Addr::UNSPECIFIED, 128), "the unspecified address"),
    (v6(Ipv6Addr::LOCALHOST, 128), "loopback"),
    (v6(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0), 10), "link-local"),
    (v6(Ipv6Addr::new(0xff00, 0, 0, 0, 0, 0, 0, 0), 8), "multicast"),
];

/// True if the prefix overlaps none of [`NEVER_ROUTED`]. The whole address space (`0.0.0.0/0`, `::/0`) is
/// therefore not routable.
pub fn is_routable(prefix: &IpNet) -> bool {
    NEVER_ROUTED.iter().all(|(never, _)| !never.contains(prefix) && !prefix.contains(never))
}

const fn v4([a, b, c, d]: [u8; 4], length: u8) -> IpNet {
    IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::new(a, b, c, d), length))
}

const fn v6(address: Ipv6Addr, length: u8) -> IpNet {
    IpNet::V6(Ipv6Net::new_assert(address, length))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefixes_that_overlap_a_special_range_are_not_routable() {
        for bad in [
            "0.0.0.0/0",
            "127.0.0.0/8",
            "127.0.0.1/32",
            "128.0.0.0/1",
            "169.254.0.0/16",
            "169.254.169.254/32",
            "224.0.0.0/24",
            "255.255.255.255/32",
            "::/0",
            "::/96",
            "fe80::/64",
            "ff00::/8",
            "ff02::/16",
        ] {
            assert!(!is_routable(&bad.parse().expect("a prefix written in a test")), "{bad}");
        }
        for good in ["10.0.0.0/8", "192.168.0.0/16", "100.64.0.0/10", "fd00::/8", "2001:db8::/32"] {
            assert!(is_routable(&good.parse().expect("a prefix written in a test")), "{good}");
        }
    }
}
