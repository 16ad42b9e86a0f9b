//! CA and serving certificate of the conversion webhook. No I/O.
//!
//! The controller creates them itself, because the API server must be able to convert before other components of the
//! cluster work. [`Material::next`] decides what is due for renewal. The API server must trust the served certificate
//! at any time:
//! - The serving certificate is renewed after two thirds of its validity, under the same CA.
//! - The CA is renewed after two thirds of its validity and published next to the old one. The serving certificate is
//!   signed by the new CA at its own next renewal, months later. An expired CA is removed from the bundle.

use jiff::{SignedDuration, Timestamp};
use rcgen::{
    Certificate, CertificateParams, DnType, ExtendedKeyUsagePurpose, Issuer, KeyPair, KeyUsagePurpose,
    PKCS_ECDSA_P256_SHA256,
};
use serde::{Deserialize, Serialize};

use crate::ca::{self, CA_LIFE, CaMaterial, NewAuthority, end, is_due, set_validity};

/// Validity of a serving certificate.
pub(crate) const SERVING_LIFE: SignedDuration = SignedDuration::from_hours(365 * 24);
// Common name of all CAs. They are distinguished by their key identifiers.
const CA_NAME: &str = "raven-controller-webhook-ca";

/// A CA that the API server trusts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Authority {
    /// Certificate in PEM.
    pub(crate) certificate: String,
    /// End of the validity.
    pub(crate) not_after: Timestamp,
}

/// Certificates and keys of the webhook, in the form stored in the Secret.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Material {
    /// All valid CAs; the first one is the newest and signs.
    pub(crate) authorities: Vec<Authority>,
    /// Private key of the newest CA in PEM.
    pub(crate) ca_key: String,
    /// Serving certificate in PEM.
    pub(crate) certificate: String,
    /// Private key of the serving certificate in PEM.
    pub(crate) key: String,
    /// End of the serving certificate's validity.
    pub(crate) not_after: Timestamp,
    /// Host names and addresses of the serving certificate.
    pub(crate) names: Vec<String>,
}

/// Renewed part of the material.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Renewal {
    /// CA and serving certificate: there were none, or the CA expired.
    First,
    /// The CA; the old one stays published.
    Ca,
    /// The serving certificate.
    Serving,
}

impl Renewal {
    /// Returns the name of the renewed part, for the log.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::First => "CA and serving certificate",
            Self::Ca => "CA",
            Self::Serving => "serving certificate",
        }
    }
}

impl CaMaterial for Material {
    const KEY: &'static str = "material.json";

    fn public_entries(&self) -> Vec<(&'static str, String)> {
        vec![("ca.crt", self.bundle()), ("tls.crt", self.certificate.clone())]
    }
}

impl Material {
    /// Returns the material that replaces `present`, if a renewal is due.
    pub(crate) fn next(
        present: Option<&Self>,
        names: &[String],
        now: Timestamp,
    ) -> Result<Option<(Self, Renewal)>, rcgen::Error> {
        let Some(present) = present.filter(|m| m.authorities.first().is_some_and(|ca| ca.not_after > now)) else {
            return Self::first(names, now).map(|material| Some((material, Renewal::First)));
        };
        let lacks_name = names.iter().any(|name| !present.names.contains(name));
        if lacks_name || is_due(present.not_after, SERVING_LIFE, now) {
            return present.renewed(names, now).map(|material| Some((material, Renewal::Serving)));
        }
        if is_due(present.authorities[0].not_after, CA_LIFE, now) {
            return present.with_new_ca(now).map(|material| Some((material, Renewal::Ca)));
        }
        Ok(None)
    }

    /// Returns the certificates of all CAs in PEM.
    pub(crate) fn bundle(&self) -> String {
        self.authorities.iter().map(|ca| ca.certificate.as_str()).collect()
    }

    fn first(names: &[String], now: Timestamp) -> Result<Self, rcgen::Error> {
        let (authority, ca_key) = create_ca(now)?;
        let blank = Self {
            authorities: vec![authority],
            ca_key,
            certificate: String::new(),
            key: String::new(),
            not_after: now,
            names: Vec::new(),
        };
        blank.renewed(names, now)
    }

    fn with_new_ca(&self, now: Timestamp) -> Result<Self, rcgen::Error> {
        let (authority, ca_key) = create_ca(now)?;
        let old = self.authorities.iter().filter(|ca| ca.not_after > now).cloned();
        Ok(Self { authorities: std::iter::once(authority).chain(old).collect(), ca_key, ..self.clone() })
    }

    fn renewed(&self, names: &[String], now: Timestamp) -> Result<Self, rcgen::Error> {
        let issuer = Issuer::new(ca::params(CA_NAME), KeyPair::from_pem(&self.ca_key)?);
        // A certificate must not outlive its CA.
        let not_after = end(now, SERVING_LIFE).min(self.authorities[0].not_after);
        let mut params = CertificateParams::new(names.to_vec())?;
        params.distinguished_name.push(DnType::CommonName, names.first().map_or(CA_NAME, String::as_str));
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        params.use_authority_key_identifier_extension = true;
        set_validity(&mut params, now, not_after);
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let certificate: Certificate = params.signed_by(&key, &issuer)?;
        let authorities = self.authorities.iter().filter(|ca| ca.not_after > now).cloned().collect();
        Ok(Self {
            authorities,
            certificate: certificate.pem(),
            key: key.serialize_pem(),
            not_after,
            names: names.to_vec(),
            ..self.clone()
        })
    }
}

fn create_ca(now: Timestamp) -> Result<(Authority, String), rcgen::Error> {
    let NewAuthority { certificate, key, not_after } = ca::create(CA_NAME, now)?;
    Ok((Authority { certificate, not_after }, key))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ca::DAY;

    fn names() -> Vec<String> {
        vec!["hook.kube-system.svc".to_owned(), "10.0.0.5".to_owned()]
    }

    fn start() -> Timestamp {
        "2026-06-01T12:00:00Z".parse().expect("a time written in a test")
    }

    fn next(present: Option<&Material>, now: Timestamp) -> Option<(Material, Renewal)> {
        Material::next(present, &names(), now).expect("certificates can be created")
    }

    fn first() -> Material {
        next(None, start()).expect("there was nothing").0
    }

    fn days(n: i64) -> SignedDuration {
        DAY * i32::try_from(n).expect("a small number")
    }

    #[test]
    fn fresh_material_is_kept() {
        let material = first();
        assert_eq!(next(Some(&material), start()), None);
        assert_eq!(next(Some(&material), start() + days(200)), None);
        let (other, renewal) = Material::next(Some(&material), &["other".to_owned()], start())
            .expect("created")
            .expect("a name is missing");
        assert_eq!(
            (renewal, other.bundle(), other.names),
            (Renewal::Serving, material.bundle(), vec!["other".to_owned()])
        );
    }

    #[test]
    fn serving_certificate_is_renewed_under_the_same_ca() {
        let material = first();
        let (renewed, renewal) =
            next(Some(&material), start() + days(260)).expect("two thirds of the validity are over");
        assert_eq!((renewal, renewed.bundle() == material.bundle()), (Renewal::Serving, true));
        assert_ne!(renewed.certificate, material.certificate);
    }

    #[test]
    fn new_ca_is_published_before_it_signs_and_an_expired_one_is_removed() {
        let mut material = first();
        // Eleven years in steps of ten days: the bundle of the previous step must trust each serving certificate.
        let mut cas = 1;
        for step in 1..=400 {
            let now = start() + days(step * 10);
            let before = material.clone();
            while let Some((renewed, renewal)) = next(Some(&material), now) {
                assert!(renewal != Renewal::First && renewed.not_after > now, "{renewal:?} at step {step}");
                cas += usize::from(renewal == Renewal::Ca);
                if renewal == Renewal::Serving {
                    assert_eq!(
                        renewed.authorities[0].not_after, before.authorities[0].not_after,
                        "signed by a CA that is not published yet"
                    );
                }
                material = renewed;
            }
            assert!(material.authorities.len() <= 2);
            assert!(material.not_after > now);
        }
        assert!(cas >= 2, "a CA was renewed");
    }

    #[test]
    fn expired_material_is_created_again() {
        let material = first();
        let (_, renewal) = next(Some(&material), start() + CA_LIFE).expect("everything is expired");
        assert_eq!(renewal, Renewal::First);
    }
}
