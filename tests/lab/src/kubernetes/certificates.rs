//! The lab's certificates: one CA, the API server's and an administrator's certificate, and the
//! key for service-account tokens.

use std::fs;
use std::path::Path;

use anyhow::Result;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
};

/// Common name of the API server's client certificate for kubelets.
pub(super) const KUBELET_CLIENT: &str = "kube-apiserver-kubelet-client";

/// Contents of kubeconfigs. The API server reads the other certificates from files.
pub(crate) struct Certificates {
    issuer: Issuer<'static, KeyPair>,
    ca: String,
    admin: String,
    admin_key: String,
}

impl Certificates {
    /// Creates all certificates and writes those that the API server reads into `dir`.
    pub(crate) fn make(dir: &Path, server_names: Vec<String>) -> Result<Self> {
        let ca_key = KeyPair::generate()?;
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, "raven-lab-ca");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
        let ca = params.self_signed(&ca_key)?.pem();
        let issuer = Issuer::new(params, ca_key);

        let server = CertificateParams::new(server_names)?;
        let (server, server_key) = sign(server, "kube-apiserver", ExtendedKeyUsagePurpose::ServerAuth, &issuer)?;
        let mut admin = CertificateParams::default();
        admin.distinguished_name.push(DnType::OrganizationName, "system:masters");
        let (admin, admin_key) = sign(admin, "raven-lab-admin", ExtendedKeyUsagePurpose::ClientAuth, &issuer)?;
        // Client certificate of the API server for kubelets.
        let mut kubelets = CertificateParams::default();
        kubelets.distinguished_name.push(DnType::OrganizationName, "system:masters");
        let (kubelets, kubelets_key) = sign(kubelets, KUBELET_CLIENT, ExtendedKeyUsagePurpose::ClientAuth, &issuer)?;
        let tokens = KeyPair::generate()?;
        let files = [
            ("ca.crt", &ca),
            ("kubelet-client.crt", &kubelets),
            ("kubelet-client.key", &kubelets_key),
            ("server.crt", &server),
            ("server.key", &server_key),
            ("service-account.key", &tokens.serialize_pem()),
            ("service-account.pub", &tokens.public_key_pem()),
        ];
        for (name, content) in files {
            fs::write(dir.join(name), content)?;
        }
        Ok(Self { issuer, ca, admin, admin_key })
    }

    /// Signs a serving certificate. Returns certificate and key (PEM).
    pub(crate) fn sign_server(&self, name: &str, names: Vec<String>) -> Result<(String, String)> {
        sign(CertificateParams::new(names)?, name, ExtendedKeyUsagePurpose::ServerAuth, &self.issuer)
    }

    /// Returns a kubeconfig with the administrator's certificate.
    pub(crate) fn admin_kubeconfig(&self, server: &str) -> String {
        let user = format!(
            "client-certificate-data: {}, client-key-data: {}",
            STANDARD.encode(&self.admin),
            STANDARD.encode(&self.admin_key)
        );
        self.kubeconfig(server, &user)
    }

    /// Returns a kubeconfig with a bearer token.
    pub(crate) fn token_kubeconfig(&self, server: &str, token: &str) -> String {
        self.kubeconfig(server, &format!("token: {token}"))
    }

    fn kubeconfig(&self, server: &str, user: &str) -> String {
        format!(
            "apiVersion: v1
kind: Config
current-context: lab
clusters:
- name: lab
  cluster: {{server: \"{server}\", certificate-authority-data: {ca}}}
users:
- name: lab
  user: {{{user}}}
contexts:
- name: lab
  context: {{cluster: lab, user: lab}}
",
            ca = STANDARD.encode(&self.ca),
        )
    }
}

fn sign(
    mut params: CertificateParams,
    name: &str,
    usage: ExtendedKeyUsagePurpose,
    issuer: &Issuer<'_, KeyPair>,
) -> Result<(String, String)> {
    params.distinguished_name.push(DnType::CommonName, name);
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![usage];
    let key = KeyPair::generate()?;
    Ok((params.signed_by(&key, issuer)?.pem(), key.serialize_pem()))
}
