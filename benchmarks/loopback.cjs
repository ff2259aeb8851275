// Servers that name no host listen on the loopback interface, and nowhere else.
const net = require('node:net');

const listen = net.Server.prototype.listen;
net.Server.prototype.listen = function (port, host, ...rest) {
  return listen.call(this, port, host ?? '127.0.0.1', ...rest);
};
