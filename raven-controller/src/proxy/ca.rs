//! The authority that signs proxies' certificates, as its Secret keeps it. Pure.
//!
//! A renewal must leave no moment in which two ends of a tunnel do not trust each other: a new CA is published beside the old one a day
//! before it signs, and an old one stays published until it ends.

use jiff::{SignedDuration, Timestamp};
use raven_api::proxy::UID_URI;
use rcgen::{
    CertificateParams, CertificateSigningRequestParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};
use serde::{Deserialize, Serialize};

use super::sign::{Granted, Signer};
use crate::authority::{self, CA_LIFE, DAY, NewAuthority, is_due, set_life};

const NAME: &str = "raven-proxy-ca";
/// Of all subjects.
const ORGANIZATION: &str = "raven:proxy";

/// One CA.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Authority {
    /// PEM.
    pub certificate: String,
    /// PEM.
    pub key: String,
    /// When it was published.
    pub since: Timestamp,
    /// When it ends.
    pub not_after: Timestamp,
}

/// All of them, the newest first.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Authorities(Vec<Authority>);

impl Authorities {
    /// What should be there instead of `present`, if anything.
    pub fn next(present: Option<&Self>, now: Timestamp) -> Result<Option<Self>, rcgen::Error> {
        let good: Vec<Authority> = present.into_iter().flat_map(|p| p.0.iter()).filter(|ca| ca.not_after > now).cloned().collect();
        let fresh = good.first().is_some_and(|newest| !is_due(newest.not_after, CA_LIFE, now));
        if fresh && present.is_some_and(|p| p.0.len() == good.len()) {
            return Ok(None);
        }
        if fresh {
            return Ok(Some(Self(good)));
        }
        let NewAuthority { certificate, key, not_after } = authority::make(NAME, now)?;
        let new = Authority { certificate, key, since: now, not_after };
        Ok(Some(Self(std::iter::once(new).chain(good).collect())))
    }

    /// What everybody is to trust, PEM.
    pub fn bundle(&self) -> String {
        self.0.iter().map(|ca| ca.certificate.as_str()).collect()
    }

    /// Signs what was granted: PEM.
    pub fn sign(&self, granted: Granted, now: Timestamp) -> Result<String, rcgen::Error> {
        // The newest that everybody has had a day to hear of; in the beginning there is only one.
        let known = self.0.iter().find(|ca| now.duration_since(ca.since) > DAY);
        let signs = known.or(self.0.last()).ok_or(rcgen::Error::CouldNotParseCertificate)?;
        let issuer = Issuer::new(authority::params(NAME), KeyPair::from_pem(&signs.key)?);
        let Granted { node, uid, names, signer, public_key, life } = granted;
        // Nothing of the request but its key and the names that were checked.
        let mut params = CertificateParams::new(names)?;
        params.subject_alt_names.push(SanType::URI(format!("{UID_URI}{uid}").try_into()?));
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::OrganizationName, ORGANIZATION);
        params.distinguished_name.push(DnType::CommonName, node);
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![match signer {
            Signer::Client => ExtendedKeyUsagePurpose::ClientAuth,
            Signer::Server => ExtendedKeyUsagePurpose::ServerAuth,
        }];
        params.use_authority_key_identifier_extension = true;
        let end = (now + life.max(SignedDuration::from_hours(24)) + DAY).min(signs.not_after);
        set_life(&mut params, now, end);
        Ok(CertificateSigningRequestParams { params, public_key }.signed_by(&issuer)?.pem())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn start() -> Timestamp {
        "2026-06-01T12:00:00Z".parse().expect("a time written in a test")
    }

    #[test]
    fn a_ca_is_made_once_and_joined_by_the_next_one_long_before_it_ends() {
        let mut authorities = Authorities::next(None, start()).expect("made").expect("there was none");
        assert_eq!(Authorities::next(Some(&authorities), start() + DAY * 1000).expect("looked at"), None);
        let first = authorities.clone();
        let mut most = 0;
        for step in 1..800 {
            let now = start() + DAY * (step * 10);
            if let Some(next) = Authorities::next(Some(&authorities), now).expect("made") {
                let signed_until_now = authorities.0.iter().find(|ca| now.duration_since(ca.since) > DAY).expect("one signs");
                assert!(next.0.contains(signed_until_now) || signed_until_now.not_after <= now, "what was signed yesterday is trusted");
                authorities = next;
            }
            most = most.max(authorities.0.len());
        }
        assert_eq!(most, 2);
        assert_ne!(authorities.bundle(), first.bundle());
    }
}
