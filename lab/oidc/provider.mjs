// A provider of OpenID Connect on loopback, with one client: node provider.mjs CONFIGURATION.json
// Nobody types a password: `?account=NAME` at the page where others ask for one signs NAME in.
import { generateKeyPairSync, randomBytes } from 'node:crypto'
import { readFileSync } from 'node:fs'
import { createServer } from 'node:https'
import Provider from 'oidc-provider'

const config = JSON.parse(readFileSync(process.argv[2]))
const { privateKey } = generateKeyPairSync('ec', { namedCurve: 'P-256' })

const provider = new Provider(config.issuer, {
  clients: [{
    client_id: config.client_id,
    client_secret: config.client_secret,
    redirect_uris: [config.redirect_uri],
    id_token_signed_response_alg: 'ES256'
  }],
  jwks: { keys: [{ ...privateKey.export({ format: 'jwk' }), use: 'sig', alg: 'ES256' }] },
  cookies: { keys: [randomBytes(16).toString('hex')] },
  claims: { openid: ['sub'], email: ['email', 'email_verified'], profile: ['name'] },
  features: { devInteractions: { enabled: false } },
  pkce: { required: () => true },
  interactions: { url: (_context, interaction) => `/interaction/${interaction.uid}` },
  findAccount: (_context, id) => ({ accountId: id, claims: () => ({ sub: id, ...config.accounts[id] }) }),
  // Whoever signs in agrees to what the client asks for.
  loadExistingGrant: async (context) => {
    const grant = new context.oidc.provider.Grant({
      clientId: context.oidc.client.clientId,
      accountId: context.oidc.session.accountId
    })
    grant.addOIDCScope('openid email profile')
    await grant.save()
    return grant
  }
})

const serve = provider.callback()
const tls = { cert: readFileSync(config.certificate), key: readFileSync(config.key) }
createServer(tls, async (request, response) => {
  const url = new URL(request.url, config.issuer)
  const account = url.searchParams.get('account')
  if (url.pathname.startsWith('/interaction/') && account in config.accounts) {
    await provider.interactionFinished(request, response, { login: { accountId: account } })
  } else {
    serve(request, response)
  }
}).listen(config.port, '127.0.0.1')
