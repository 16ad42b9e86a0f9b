//! Which certificate requests are granted: those whose requester can be proved to be the agent on the node that the certificate is for.
//! Pure.
//!
//! The proof is the node's name and UID in the requester's token: the kubelet had it bound to the agent's Pod, and the API server put the
//! Pod's node into the request (KEP-4193; Kubernetes 1.30 and later). The agent says nothing that is believed. The certificate is for that
//! very Node object: one that is deleted takes it along, also where a later one has the same name.

use std::collections::{BTreeMap, BTreeSet};

use jiff::SignedDuration;
use k8s_openapi::api::certificates::v1::CertificateSigningRequestSpec;
use raven_api::{
    AGENT_SERVICE_ACCOUNT, Gateway,
    gateway::EndpointType,
    proxy::{CONFIG_HOSTNAME, SIGNER_CLIENT, SIGNER_SERVER, canonical_host},
};
use rcgen::{CertificateSigningRequestParams, PublicKey, SanType};

/// Where the API server tells the node of a bound token.
const NODE_CLAIM: &str = "authentication.kubernetes.io/node-name";
/// The same for its UID.
const UID_CLAIM: &str = "authentication.kubernetes.io/node-uid";
/// The longest that is granted.
const LONGEST: SignedDuration = SignedDuration::from_hours(90 * 24);

/// Our signers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signer {
    /// For those who dial.
    Client,
    /// For those who are dialled.
    Server,
}

impl Signer {
    /// By the name in a request.
    pub fn of(name: &str) -> Option<Self> {
        match name {
            SIGNER_CLIENT => Some(Self::Client),
            SIGNER_SERVER => Some(Self::Server),
            _ => None,
        }
    }

    fn usage(self) -> &'static str {
        match self {
            Self::Client => "client auth",
            Self::Server => "server auth",
        }
    }
}

/// What will be signed.
#[derive(Debug)]
pub struct Granted {
    /// The node.
    pub node: String,
    /// Its UID.
    pub uid: String,
    /// Names and addresses.
    pub names: Vec<String>,
    /// By whom.
    pub signer: Signer,
    /// The requester's key.
    pub public_key: PublicKey,
    /// For how long.
    pub life: SignedDuration,
}

/// Why a request is refused: for the requester, and for the Event.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Somebody else.
    #[error("only agents may ask ({expected}), not {username}")]
    NotAnAgent {
        /// Who asked.
        username: String,
        /// Who may.
        expected: String,
    },
    /// A token that was not bound to a Pod on a node.
    #[error("the requester's token is not bound to a node: agents ask with the token that the kubelet mounts into their Pod")]
    NoNode,
    /// The node does not exist (any more).
    #[error("node {0} does not exist")]
    NodeGone(String),
    /// The token is of an earlier node of that name.
    #[error(
        "the requester's token was bound to another node {0}, which was deleted; its box can have no certificate. If it is still that node, \
         delete the agent's Pod there: the next one gets a token of its own"
    )]
    NodeReplaced(String),
    /// Not a request, or its signature is wrong.
    #[error("no certificate request: {0}")]
    Malformed(String),
    /// Names that are not the node's.
    #[error("the agent on node {node} may have a certificate for {allowed}, not for {asked}")]
    Names {
        /// Its node.
        node: String,
        /// What it may have.
        allowed: String,
        /// What it asked for.
        asked: String,
    },
    /// Other usages.
    #[error("usages must be `digital signature` and `{wanted}`, not {asked}")]
    Usages {
        /// What they must be.
        wanted: &'static str,
        /// What they are.
        asked: String,
    },
    /// A server's certificate for a node that serves nobody.
    #[error("node {0} is no elected proxy node of an exposed Gateway")]
    NotElected(String),
}

impl Refusal {
    /// CamelCase, stable.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::NotAnAgent { .. } => "NotAnAgent",
            Self::NoNode => "TokenNotBound",
            Self::NodeGone(_) => "NodeGone",
            Self::NodeReplaced(_) => "NodeReplaced",
            Self::Malformed(_) => "Malformed",
            Self::Names { .. } => "NamesNotAllowed",
            Self::Usages { .. } => "UsagesNotAllowed",
            Self::NotElected(_) => "NotElected",
        }
    }
}

/// What is known of the cluster.
#[derive(Clone, Debug)]
pub struct Facts<'a> {
    /// Namespace of the agents' account.
    pub namespace: &'a str,
    /// UIDs of all Nodes, by name.
    pub nodes: &'a BTreeMap<String, String>,
    /// All Gateways, with their status.
    pub gateways: &'a [Gateway],
}

/// Grants or refuses.
pub fn judge(request: &CertificateSigningRequestSpec, signer: Signer, facts: &Facts<'_>) -> Result<Granted, Refusal> {
    let (node, uid) = requester(request, facts)?;
    let allowed = allowed(&node, signer, facts)?;
    usages(request, signer)?;
    let (names, public_key) = asked(&request.request.0)?;
    let asked: BTreeSet<&String> = names.iter().collect();
    if asked.is_empty() || !asked.iter().all(|name| allowed.contains(*name)) {
        let list = |names: &mut dyn Iterator<Item = &String>| names.map(String::as_str).collect::<Vec<_>>().join(", ");
        let asked = if asked.is_empty() { "no name".to_owned() } else { list(&mut asked.into_iter()) };
        return Err(Refusal::Names { node, allowed: list(&mut allowed.iter()), asked });
    }
    let life = request.expiration_seconds.map_or(LONGEST, |s| SignedDuration::from_secs(s.into())).min(LONGEST);
    Ok(Granted { node, uid, names, signer, public_key, life })
}

fn requester(request: &CertificateSigningRequestSpec, facts: &Facts<'_>) -> Result<(String, String), Refusal> {
    let expected = format!("system:serviceaccount:{}:{AGENT_SERVICE_ACCOUNT}", facts.namespace);
    let username = request.username.clone().unwrap_or_default();
    if username != expected {
        return Err(Refusal::NotAnAgent { username, expected });
    }
    let claim = |name: &str| request.extra.as_ref()?.get(name)?.first().filter(|value| !value.is_empty()).cloned();
    let node = claim(NODE_CLAIM).ok_or(Refusal::NoNode)?;
    let Some(uid) = facts.nodes.get(&node) else { return Err(Refusal::NodeGone(node)) };
    match claim(UID_CLAIM) {
        Some(claimed) if claimed == *uid => Ok((node, claimed)),
        Some(_) => Err(Refusal::NodeReplaced(node)),
        // The node did not exist when the token was made.
        None => Err(Refusal::NoNode),
    }
}

fn allowed(node: &str, signer: Signer, facts: &Facts<'_>) -> Result<BTreeSet<String>, Refusal> {
    if signer == Signer::Client {
        return Ok(BTreeSet::from([node.to_owned()]));
    }
    let mut names = BTreeSet::new();
    for gateway in facts.gateways.iter().filter(|g| !g.spec.expose_type.is_edge()) {
        let Some(status) = &gateway.status else { continue };
        let elected = status.active_endpoints.iter().filter(|e| e.type_ == EndpointType::Proxy && e.node_name == node);
        for endpoint in elected {
            names.extend(endpoint.public_ip.as_deref().filter(|ip| !ip.is_empty()).map(canonical_host));
            names.extend(endpoint.config.get(CONFIG_HOSTNAME).cloned());
            names.extend(status.nodes.iter().filter(|n| n.node_name == node).map(|n| n.private_ip.clone()));
        }
    }
    if names.is_empty() { Err(Refusal::NotElected(node.to_owned())) } else { Ok(names) }
}

fn usages(request: &CertificateSigningRequestSpec, signer: Signer) -> Result<(), Refusal> {
    let asked: BTreeSet<&str> = request.usages.iter().flatten().map(String::as_str).collect();
    let wanted = BTreeSet::from(["digital signature", signer.usage()]);
    if asked == wanted {
        return Ok(());
    }
    Err(Refusal::Usages { wanted: signer.usage(), asked: asked.into_iter().collect::<Vec<_>>().join(", ") })
}

/// The names in a request, and its key; the request is signed by that key.
fn asked(pem: &[u8]) -> Result<(Vec<String>, PublicKey), Refusal> {
    let malformed = |e: &dyn std::fmt::Display| Refusal::Malformed(e.to_string());
    let text = std::str::from_utf8(pem).map_err(|e| malformed(&e))?;
    let request = CertificateSigningRequestParams::from_pem(text).map_err(|e| malformed(&e))?;
    let names = request.params.subject_alt_names.iter().map(|name| match name {
        SanType::DnsName(name) => Ok(name.as_str().to_owned()),
        SanType::IpAddress(ip) => Ok(ip.to_string()),
        other => Err(Refusal::Malformed(format!("a name of kind {other:?}"))),
    });
    Ok((names.collect::<Result<_, _>>()?, request.public_key))
}

#[cfg(test)]
mod tests {
    use k8s_openapi::ByteString;
    use raven_api::{
        GatewaySpec, GatewayStatus,
        gateway::{Endpoint, ExposeType, NodeInfo},
    };
    use rcgen::{CertificateParams, KeyPair};

    use super::*;

    fn request(names: &[&str], usage: &str, node: Option<&str>) -> CertificateSigningRequestSpec {
        let key = KeyPair::generate().expect("a key");
        let params = CertificateParams::new(names.iter().map(|n| (*n).to_owned()).collect::<Vec<_>>()).expect("names");
        let pem = params.serialize_request(&key).expect("a request").pem().expect("PEM");
        CertificateSigningRequestSpec {
            request: ByteString(pem.into_bytes()),
            username: Some("system:serviceaccount:kube-system:raven-agent-account".to_owned()),
            usages: Some(vec!["digital signature".to_owned(), usage.to_owned()]),
            extra: node.map(|node| {
                BTreeMap::from([(NODE_CLAIM.to_owned(), vec![node.to_owned()]), (UID_CLAIM.to_owned(), vec![format!("uid-of-{node}")])])
            }),
            ..CertificateSigningRequestSpec::default()
        }
    }

    fn judged(request: &CertificateSigningRequestSpec, signer: Signer) -> Result<Granted, Refusal> {
        judged_at("198.51.100.10", request, signer)
    }

    fn judged_at(public_ip: &str, request: &CertificateSigningRequestSpec, signer: Signer) -> Result<Granted, Refusal> {
        let endpoint = Endpoint {
            node_name: "cloud-a".to_owned(),
            type_: EndpointType::Proxy,
            public_ip: Some(public_ip.to_owned()),
            ..Endpoint::default()
        };
        let mut gateway = Gateway::new("cloud", GatewaySpec { expose_type: ExposeType::PublicIP, ..GatewaySpec::default() });
        let info = NodeInfo { node_name: "cloud-a".to_owned(), private_ip: "10.0.0.11".to_owned(), subnets: vec![] };
        gateway.status = Some(GatewayStatus { nodes: vec![info], active_endpoints: vec![endpoint], ..GatewayStatus::default() });
        let nodes = ["cloud-a", "x-a", "x-b"].map(|node| (node.to_owned(), format!("uid-of-{node}"))).into();
        judge(request, signer, &Facts { namespace: "kube-system", nodes: &nodes, gateways: &[gateway] })
    }

    fn refused(request: &CertificateSigningRequestSpec, signer: Signer) -> &'static str {
        judged(request, signer).expect_err("it is refused").reason()
    }

    #[test]
    fn an_agent_gets_a_certificate_for_its_own_node_and_no_other() {
        let own = judged(&request(&["x-a"], "client auth", Some("x-a")), Signer::Client).expect("granted");
        assert_eq!((own.node.as_str(), own.names), ("x-a", vec!["x-a".to_owned()]));
        assert_eq!(refused(&request(&["x-b"], "client auth", Some("x-a")), Signer::Client), "NamesNotAllowed");
        assert_eq!(refused(&request(&["x-a", "x-b"], "client auth", Some("x-a")), Signer::Client), "NamesNotAllowed");
        assert_eq!(refused(&request(&[], "client auth", Some("x-a")), Signer::Client), "NamesNotAllowed");
        assert_eq!(refused(&request(&["gone"], "client auth", Some("gone")), Signer::Client), "NodeGone");
    }

    #[test]
    fn who_cannot_prove_its_node_gets_nothing() {
        assert_eq!(refused(&request(&["x-a"], "client auth", None), Signer::Client), "TokenNotBound");
        let mut other = request(&["x-a"], "client auth", Some("x-a"));
        other.username = Some("system:serviceaccount:default:x".to_owned());
        assert_eq!(refused(&other, Signer::Client), "NotAnAgent");
    }

    #[test]
    fn the_token_of_an_earlier_node_of_that_name_is_worth_nothing() {
        let mut earlier = request(&["x-a"], "client auth", Some("x-a"));
        let mut claim = |uid: Option<&str>| {
            let extra = earlier.extra.as_mut().expect("claims");
            match uid {
                Some(uid) => drop(extra.insert(UID_CLAIM.to_owned(), vec![uid.to_owned()])),
                None => drop(extra.remove(UID_CLAIM)),
            }
            judged(&earlier, Signer::Client).map(|granted| granted.uid).map_err(|refusal| refusal.reason())
        };
        assert_eq!(claim(Some("uid-of-another-x-a")), Err("NodeReplaced"));
        assert_eq!(claim(None), Err("TokenNotBound"));
        assert_eq!(claim(Some("uid-of-x-a")), Ok("uid-of-x-a".to_owned()));
    }

    #[test]
    fn a_server_is_an_elected_node_of_an_exposed_gateway_by_its_own_addresses() {
        for name in ["198.51.100.10", "10.0.0.11"] {
            judged(&request(&[name], "server auth", Some("cloud-a")), Signer::Server).expect("granted");
        }
        assert_eq!(refused(&request(&["198.51.100.99"], "server auth", Some("cloud-a")), Signer::Server), "NamesNotAllowed");
        assert_eq!(refused(&request(&["x-a"], "server auth", Some("x-a")), Signer::Server), "NotElected");
        assert_eq!(refused(&request(&["198.51.100.10"], "client auth", Some("cloud-a")), Signer::Server), "UsagesNotAllowed");
    }

    #[test]
    fn an_address_is_the_same_however_somebody_wrote_it() {
        let request = request(&["2001:db8::1"], "server auth", Some("cloud-a"));
        for written in ["2001:db8::1", "2001:DB8::1", "2001:db8:0::1", "2001:0db8:0000:0000:0000:0000:0000:0001"] {
            let granted = judged_at(written, &request, Signer::Server).unwrap_or_else(|refusal| panic!("{written}: {refusal}"));
            assert_eq!(granted.names, ["2001:db8::1"]);
        }
        assert_eq!(judged_at("2001:db8::2", &request, Signer::Server).expect_err("another's").reason(), "NamesNotAllowed");
    }

    #[test]
    fn what_is_no_request_or_is_not_signed_by_its_key_is_refused() {
        let mut broken = request(&["x-a"], "client auth", Some("x-a"));
        broken.request = ByteString(b"hello".to_vec());
        assert_eq!(refused(&broken, Signer::Client), "Malformed");
        let mut forged = request(&["x-a"], "client auth", Some("x-a"));
        let at = forged.request.0.len() - 60;
        forged.request.0[at] = if forged.request.0[at] == b'A' { b'B' } else { b'A' };
        assert_eq!(refused(&forged, Signer::Client), "Malformed");
    }
}
