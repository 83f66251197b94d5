open('executed', 'w')
