//! Who owns a prefix: a trie over all that is claimed so far.
//!
//! First come, first served; the caller comes in the order of seniority. Answers with the owner that stands in the way.

use std::net::IpAddr;

use ipnet::IpNet;
use prefix_trie::joint::JointPrefixMap;

use super::{GatewayName, NodeName};

/// What a prefix was claimed as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A node's podCIDR.
    Pod,
    /// Extra, by annotation of the Gateway.
    Extra,
}

/// Who holds a prefix.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owner {
    /// The Gateway.
    pub gateway: GatewayName,
    /// The node that carries it.
    pub node: NodeName,
    /// As what.
    pub kind: Kind,
}

/// Two claims that cannot both hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Conflict {
    /// What is held already and overlaps.
    pub held: IpNet,
    /// By whom.
    pub owner: Owner,
}

/// All prefixes claimed so far.
#[derive(Default)]
pub struct Claims {
    held: JointPrefixMap<IpNet, Owner>,
}

impl Claims {
    /// Claims `prefix` for `owner`. `Ok(false)`: the same pool holds the same prefix already, nothing to add.
    pub fn claim(&mut self, prefix: IpNet, owner: Owner) -> Result<bool, Conflict> {
        // Both directions: what contains the prefix, and what it contains.
        let overlapping = self.held.cover(&prefix).chain(self.held.children(&prefix));
        let conflict = overlapping
            .filter(|(held, other)| Self::collide(prefix, &owner, *held, other))
            // The smallest by name, so that the message does not depend on how the trie walks.
            .min_by(|a, b| (&a.1.gateway, a.0).cmp(&(&b.1.gateway, b.0)))
            .map(|(held, other)| Conflict { held, owner: other.clone() });
        if let Some(conflict) = conflict {
            return Err(conflict);
        }
        if self.held.get(&prefix).is_some() {
            return Ok(false);
        }
        self.held.insert(prefix, owner);
        Ok(true)
    }

    /// Who has the pod prefix that `address` lies in.
    pub fn holder(&self, address: IpAddr) -> Option<(IpNet, &Owner)> {
        self.held.cover(&IpNet::from(address)).filter(|(_, owner)| owner.kind == Kind::Pod).last()
    }

    // Inside one pool an extra prefix may lie around or within a node's: the longest match tells them apart.
    fn collide(prefix: IpNet, owner: &Owner, held: IpNet, other: &Owner) -> bool {
        if owner.gateway != other.gateway {
            return true;
        }
        if owner.node == other.node && prefix == held {
            return false;
        }
        owner.kind == Kind::Pod && other.kind == Kind::Pod
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn owner(gateway: &str, node: &str, kind: Kind) -> Owner {
        Owner { gateway: gateway.into(), node: node.into(), kind }
    }

    fn net(text: &str) -> IpNet {
        text.parse().expect("a prefix written in a test")
    }

    #[test]
    fn wider_and_narrower_prefixes_of_another_pool_are_refused() {
        let mut claims = Claims::default();
        assert_eq!(claims.claim(net("10.1.0.0/16"), owner("a", "a1", Kind::Pod)), Ok(true));
        let narrower = claims.claim(net("10.1.2.0/24"), owner("b", "b1", Kind::Pod)).expect_err("lies within");
        assert_eq!(narrower.held, net("10.1.0.0/16"));
        let wider = claims.claim(net("10.0.0.0/8"), owner("b", "b1", Kind::Extra)).expect_err("lies around");
        assert_eq!(wider.owner.gateway, "a".into());
        assert_eq!(claims.claim(net("10.2.0.0/16"), owner("b", "b1", Kind::Pod)), Ok(true));
        assert_eq!(claims.claim(net("fd00::/64"), owner("b", "b1", Kind::Pod)), Ok(true));
    }

    #[test]
    fn one_pool_may_nest_an_extra_prefix_but_not_two_nodes_prefixes() {
        let mut claims = Claims::default();
        assert_eq!(claims.claim(net("10.1.1.0/24"), owner("a", "a1", Kind::Pod)), Ok(true));
        assert!(claims.claim(net("10.1.1.0/24"), owner("a", "a2", Kind::Pod)).is_err());
        assert_eq!(claims.claim(net("10.1.0.0/16"), owner("a", "a1", Kind::Extra)), Ok(true));
        assert_eq!(claims.claim(net("10.1.1.0/24"), owner("a", "a2", Kind::Extra)), Ok(false));
    }
}
